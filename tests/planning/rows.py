"""A rule of rows for tests: simple numbers, and a count of how often it was asked."""


class SimpleRows:
    """A row per 1000 pixels, two frames of a video together, 10 rows a second of sound."""

    def __init__(self) -> None:
        self.num_asked = 0

    def image(self, width: int, height: int) -> tuple[int, ...]:
        self.num_asked += 1
        return (max(1, width * height // 1000),)

    def video(self, frames: int, width: int, height: int) -> tuple[int, ...]:
        self.num_asked += 1
        return (max(1, width * height // 1000),) * ((frames + 1) // 2)

    def audio(self, seconds: float) -> tuple[int, ...]:
        self.num_asked += 1
        return (int(10 * seconds) + 1,)
