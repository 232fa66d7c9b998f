"""The command line. Each command is a module of `triptych.commands`, and imports what is heavy when it runs."""

import sys
from collections.abc import Callable
from typing import Annotated

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


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"triptych {__version__}")
        raise typer.Exit


SUMMARIES: dict[Callable[..., None], str] = {  # that are whole in 80 columns
    serve: "Serve a model on any placement of the three stages.",
    bench: "Load an OpenAI-compatible server and print how it did.",
    capacity: "Say what fits into the memory of a GPU, by role.",
    simulate: "Say what a placement would do under a load, without a GPU.",
    plan: "Say which placement to buy for a load, and if splitting pays.",
    profile: "Measure what a step costs here, for simulate and plan.",
    version: "Print the version.",
}
for command, summary in SUMMARIES.items():
    app.command(short_help=summary)(command)


@app.callback()
def common(
    shows_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print name and version.")
    ] = False,
) -> None:
    """Serve large multimodal models in three stages: encode, prefill, decode. And say which placement to buy."""


def _say(error: TriptychError, code: int) -> int:
    typer.echo(f"triptych: {error}", err=True)
    return code


if __name__ == "__main__":
    main()
