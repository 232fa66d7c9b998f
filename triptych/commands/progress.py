"""How far a command is that takes long, on stderr: a bar, or a line now and then where nobody sees one."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import typer

REPORT_S = 30.0  # between two lines

Advance = Callable[[], None]
Part = Callable[[str, int], AbstractContextManager[Advance]]  # of what is done, and how many steps that has


@contextmanager
def progress(command: str) -> Iterator[Part]:
    """Of a command that has parts, one after another."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text, total: _reported(f"{command}: {text}", total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:

        @contextmanager
        def part(text: str, total: int) -> Iterator[Advance]:
            task = bars.add_task(text, total=total)
            yield lambda: bars.advance(task)
            bars.remove_task(task)

        yield part


@contextmanager
def _reported(text: str, total: int) -> Iterator[Advance]:
    """When it begins, and as time goes by: also where no step is done for long."""
    began_s, done, over = time.monotonic(), 0, threading.Event()

    def advance() -> None:
        nonlocal done
        done += 1

    def report() -> None:
        while not over.wait(REPORT_S):
            share = f", {done} of {total}" if total > 1 else ""
            typer.echo(f"{text}{share} after {time.monotonic() - began_s:.0f} s", err=True)

    typer.echo(f"{text}{f', {total}' if total > 1 else ''}", err=True)
    reports = threading.Thread(target=report, daemon=True)
    reports.start()
    try:
        yield advance
    finally:
        over.set()
        reports.join()
