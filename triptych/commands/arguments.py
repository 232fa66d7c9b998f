"""What several commands ask of their flags. Raises ConfigError that names the flag."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from triptych.config import require
from triptych.errors import ConfigError

if TYPE_CHECKING:
    from triptych.planning.quantities import Quantity

Unit = TypeVar("Unit", bound="Quantity")


def check_range(flag: str, number: int | None, low: int, high: int) -> None:
    require(number is None or low <= number <= high, flag, f"{number} is not between {low} and {high}")


def check_folders(files: Mapping[str, Path | None]) -> None:
    """Of files by their flags, before anything is computed for them."""
    for flag, path in files.items():
        if path is not None:
            require(path.parent.is_dir(), flag, f"{path}: there is no folder {path.parent}")
            require(not path.is_dir(), flag, f"{path} is a folder")


def quantity(flag: str, kind: type[Unit], text: str) -> Unit:
    """A number with its unit."""
    try:
        return kind.parse(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from None
