"""Reads numbers out of a model's config, with the defaults of its type. Every error names the key by its whole path."""

from collections.abc import Mapping
from typing import Any

from triptych.errors import ConfigError

MOST = 1 << 30  # larger numbers are no sizes
MOST_LAYERS, MOST_TILES = 10_000, 144  # which are gone through one by one


class Fields:
    """One object of a config. What it does not say is as the defaults have it; a key that neither has is an error."""

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, *, name: str = "") -> None:
        self.name = name
        self._given = {key: value for key, value in given.items() if value is not None}
        self._defaults = defaults or {}

    def get(self, key: str) -> Any:
        """None where neither has it."""
        return self._given.get(key, self._defaults.get(key))

    @property
    def given(self) -> dict[str, Any]:
        return dict(self._given)

    def is_given(self, key: str) -> bool:
        return key in self._given

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = MOST) -> int:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.path(key)}: is missing; a whole number of {least} or more is needed")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 != 0:
            raise ConfigError(f"{self.path(key)}: {value!r} is not a whole number of {least} or more")
        if not least <= value <= most:
            raise ConfigError(f"{self.path(key)}: {value!r} is outside {least}..{most}")
        return int(value)

    def square(self, key: str) -> int:
        """A side that configs write as one number or as a pair of equal ones."""
        value = self.get(key)
        if not isinstance(value, list):
            return self.integer(key)
        if not value or any(side != value[0] for side in value):
            raise ConfigError(f"{self.path(key)}: {value!r} is no square; two equal sides are needed")
        return Fields({key: value[0]}, name=self.name).integer(key)

    def number(self, key: str, default: float | None = None, *, least: float = 1e-6, most: float = MOST) -> float:
        value = self.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise ConfigError(f"{self.path(key)}: {value!r} is not a number from {least:g} to {most:g}")
        return float(value)

    def items(self, key: str) -> list[Any]:
        """Empty where nobody says anything."""
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            raise ConfigError(f"{self.path(key)}: {value!r} is no list")
        return value or []

    def flag(self, key: str) -> bool:
        """False where nobody says anything."""
        return bool(self.get(key))

    def text(self, key: str) -> str:
        """Empty where nobody says anything."""
        return str(self.get(key) or "")

    def part(self, key: str, defaults: Mapping[str, Any] | None = None) -> "Fields":
        """An object within this one; empty where there is none."""
        value = self.get(key) or {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.path(key)}: {value!r} is no object")
        return Fields(value, defaults, name=self.path(key))

    def path(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key
