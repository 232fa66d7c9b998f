"""The command line. Each command is a module of `triptych.commands`, and imports what is heavy when it runs."""

import sys

import typer

from triptych import __version__
from triptych.commands.bench import bench
from triptych.commands.capacity import capacity
from triptych.commands.plan import plan
from triptych.commands.profile import profile
from triptych.commands.serve import serve
from triptych.commands.simulate import simulate
from triptych.errors import EXIT_FAILED, EXIT_REFUSED, ConfigError, TriptychError

app = typer.Typer(
    help="Serve large multimodal models in three stages: encode, prefill, decode. And say which placement to buy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes cut the names of flags off in 80 columns
)


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 asked for something that cannot be."""
    try:
        app()
    except ConfigError as error:
        sys.exit(_say(error, EXIT_REFUSED))
    except TriptychError as error:
        sys.exit(_say(error, EXIT_FAILED))


def version() -> None:
    """Print the version."""
    typer.echo(__version__)


for command in (serve, bench, capacity, simulate, plan, profile, version):
    app.command()(command)


def _say(error: TriptychError, code: int) -> int:
    typer.echo(f"triptych: {error}", err=True)
    return code


if __name__ == "__main__":
    main()
