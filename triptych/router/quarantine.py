"""Which sequences were computed when an instance crashed. One of them may be to blame, so they go one at a time."""

from collections import deque
from collections.abc import Iterator

from triptych.router.attempts import Task


class Quarantine:
    """Suspects in the order in which they are tried again. At most one is out."""

    def __init__(self) -> None:
        self._waiting: deque[Task] = deque()
        self._out: Task | None = None

    def is_out(self, task: Task) -> bool:
        return task is self._out

    def waiting(self) -> Iterator[Task]:
        return iter(self._waiting)

    def add(self, task: Task) -> None:
        self._waiting.append(task)

    def next(self) -> Task | None:
        """The one whose turn it is; None while one is out, or if there is none."""
        if self._out is not None or not self._waiting:
            return None
        self._out = self._waiting.popleft()
        return self._out

    def discard(self, task: Task) -> None:
        """It is no suspect any more, or ended. Idempotent."""
        if task is self._out:
            self._out = None
        elif task in self._waiting:
            self._waiting.remove(task)
