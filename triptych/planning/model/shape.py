"""A model as its config describes it: how much it weighs, what media become in it, and what work they are."""

from dataclasses import dataclass

from triptych.errors import ConfigError
from triptych.planning.model.areas import check_ratio
from triptych.planning.model.language import Language
from triptych.planning.model.tower import Tower
from triptych.planning.model.units import Pictures, Sounds, Unit, Units, Videos


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """One model. Counts of parameters are exact; `image`, `video` and `audio` are the `Rows` of a workload."""

    name: str
    language: Language
    vision: Tower | None = None
    sound: Tower | None = None
    connector: int = 0  # parameters of the encoder half beside its towers
    pictures: Pictures | None = None
    videos: Videos | None = None
    sounds: Sounds | None = None
    deepstack: int = 0  # layers of features that follow each row on its way to prefill
    marks_of_item: int = 2  # tokens of text around a picture
    marks_of_unit: int = 0  # and around each of its units
    weight_bytes: int = 2  # of one number

    @property
    def encoder_parameters(self) -> int:
        towers = (self.vision, self.sound)
        return self.connector + sum(tower.parameters + tower.projector for tower in towers if tower is not None)

    @property
    def language_parameters(self) -> int:
        return self.language.parameters

    @property
    def parameters(self) -> int:
        return self.encoder_parameters + self.language_parameters

    @property
    def context(self) -> int:
        return self.language.context

    @property
    def row_width(self) -> int:
        """Numbers of one embedding row."""
        return self.language.hidden * (1 + self.deepstack)

    @property
    def row_bytes(self) -> int:
        return self.row_width * self.weight_bytes

    @property
    def kv_token_bytes(self) -> int:
        return self.language.kv_per_token * self.weight_bytes

    @property
    def kv_sequence_bytes(self) -> int:
        """Kept for a sequence of any length."""
        return 4 * self.language.matrix_state + self.weight_bytes * self.language.window_state

    def image(self, width: int, height: int, num_images: int = 1) -> tuple[int, ...]:
        """Rows of each unit of a picture. Where the model makes less of one among several, `num_images` counts."""
        return tuple(unit.rows for unit in self.image_units(width, height, num_images))

    def video(self, frames: int, width: int, height: int) -> tuple[int, ...]:
        return tuple(unit.rows for unit in self.video_units(frames, width, height))

    def audio(self, seconds: float) -> tuple[int, ...]:
        return tuple(unit.rows for unit in self.audio_units(seconds))

    def image_units(self, width: int, height: int, num_images: int = 1) -> Units:
        if self.pictures is None:
            raise ConfigError(f"{self.name}: takes no pictures")
        _require_positive(width=width, height=height)
        check_ratio(width, height)
        units = self.pictures.units(width, height, num_images)
        if min(unit.rows for unit in units) < 1:
            raise ConfigError(
                f"{self.name}: a picture of {width}x{height} has a unit without rows by the sizes in its config"
            )
        return units

    def video_units(self, frames: int, width: int, height: int) -> Units:
        if self.videos is None:
            raise ConfigError(f"{self.name}: takes no videos")
        _require_positive(frames=frames, width=width, height=height)
        check_ratio(width, height)
        return self.videos.units(frames, width, height)

    def audio_units(self, seconds: float) -> Units:
        if self.sounds is None:
            raise ConfigError(f"{self.name}: takes no audio")
        _require_positive(seconds=seconds)
        return self.sounds.units(seconds)

    def prompt_tokens(self, units: Units) -> int:
        """Of one item: its rows and the marks around them."""
        return sum(unit.rows for unit in units) + len(units) * self.marks_of_unit + self.marks_of_item

    def encode_flops(self, unit: Unit, *, sound: bool = False) -> float:
        tower = self.sound if sound else self.vision
        assert tower is not None, f"{self.name} has no such tower"
        of_rows = tower.flops_per_row + (0.0 if sound else 2.0 * self.connector)
        return (
            unit.positions * tower.flops_per_position + tower.flops_of_attention(unit.positions) + unit.rows * of_rows
        )


def _require_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ConfigError(f"{name}: {number} is not above 0")
