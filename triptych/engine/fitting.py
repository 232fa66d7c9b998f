"""Makes an instance fit for a role, at its start and whenever it changes: weights, slab, pools, stages, runners."""

import contextlib
import io
import logging
import time
import wave
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace
from PIL import Image
from transformers import PreTrainedModel

from triptych.config import InstanceConfig
from triptych.core import Media, Role
from triptych.engine.equipment import Equipment, Runners
from triptych.engine.pools import Layouts, PoolPlan, plan_pools
from triptych.engine.threads import set_niceness, thread_setter
from triptych.errors import ConfigError
from triptych.model.caches import EmbeddingRegion, KVRegion
from triptych.model.encoder import EncodeRunner
from triptych.model.families import family_for
from triptych.model.language import LanguageRunner
from triptych.model.loading import Half, load_config, load_half, resolve_max_model_len
from triptych.model.processor import Processor
from triptych.stages.base import Surroundings
from triptych.stages.group import StageGroup
from triptych.transfer.select import Transfers
from triptych.transfer.slab import Slab, available_bytes, slab_bytes

logger = logging.getLogger(__name__)

WARM_UP_SIDE = 224  # pixels
WARM_UP_SECONDS = 0.5
WARM_UP_RATE = 16_000  # samples per second


@dataclass(slots=True)
class Weights:
    """The two halves of the model; a half that the role has no use for is None."""

    encode: PreTrainedModel | None = None
    language: PreTrainedModel | None = None


@dataclass(slots=True)
class _Stopwatch:
    """Seconds of each named step."""

    steps_s: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.steps_s[name] = time.monotonic() - began


class Fitter:
    """Keeps what an instance has beyond its role: the checkpoint's description, the slab, weights that are still good.

    On CPU the slab is as large as any role needs, because pages cost nothing until they are written. On CUDA it has the
    size of the role that it was made for; a role that needs more gets a new one. Every carving has an epoch of its own:
    a ticket of the old one is never read from the new one.
    """

    def __init__(self, config: InstanceConfig) -> None:
        """Raises ConfigError where the checkpoint cannot be served."""
        hf_config = load_config(config.model.path)
        self._family = family_for(hf_config)
        self._layouts = Layouts.of(config.model, hf_config)
        self._processor = Processor.load(config.model.path, revision=config.model.revision)
        self._max_model_len = resolve_max_model_len(config.model, hf_config)
        self._weights = Weights()
        self._transfers: Transfers | None = None
        self._slab: Slab | None = None
        self._num_fits = 0
        self.near = Surroundings(config.id, config.epoch, self._processor.eos_token_ids, self._max_model_len)

    def fit(self, config: InstanceConfig) -> Equipment:
        """What serves `config.role`. Nothing of an earlier equipment may be in use any more.

        Raises ConfigError where the device or the memory cannot serve the role; then `fit` may be called again.
        """
        watch = _Stopwatch()
        self._num_fits += 1
        if self._num_fits > 1:
            self.near.epoch = f"{config.epoch}.{self._num_fits}"
        set_niceness(config.niceness)
        with watch.step("weights"):
            fresh = self._take_weights(config)
        with watch.step("pools"):
            plan = plan_pools(config, self._layouts, self._max_model_len)
            slab, transfers = self._carve(config, plan)
            pools = plan.make_pools(prefix_caching=config.memory.prefix_caching)
            whole_spans = self._family.image_groups
            stages = StageGroup(config.role, self.near, pools, config.scheduling, whole_spans=whole_spans)
            runners = self._make_runners(slab, plan)
        with watch.step("warm_up"):
            self._warm_up(runners, fresh)
        return Equipment(config, pools, stages, runners, transfers, thread_setter(config), watch.steps_s)

    @property
    def weights(self) -> Weights:
        """Of the role that it was fitted for last."""
        return self._weights

    # ---- weights

    def _take_weights(self, config: InstanceConfig) -> Weights:
        """Drops the half that the role does not use, then loads the one that is missing. Returns what is new."""
        role, had = config.role, self._weights
        self._weights = Weights(
            had.encode if role.encodes else None,
            had.language if role.has_language_model else None,
        )
        fresh = Weights()
        if role.encodes and had.encode is None:
            fresh.encode = self._weights.encode = load_half(config.model, Half.ENCODE)
        if role.has_language_model and had.language is None:
            fresh.language = self._weights.language = load_half(config.model, Half.LANGUAGE)
        return fresh

    def _warm_up(self, runners: Runners, fresh: Weights) -> None:
        """Weights that ran before are warm."""
        if fresh.encode is not None:
            assert isinstance(runners.encode, EncodeRunner)
            modality = next(name for name in self._processor.modalities if name in _WARM_UP)
            runners.encode.warm_up(_WARM_UP[modality]())
        if fresh.language is not None:
            assert isinstance(runners.language, LanguageRunner)
            runners.language.warm_up()

    # ---- memory

    def _carve(self, config: InstanceConfig, plan: PoolPlan) -> tuple[Slab, Transfers]:
        sizes = plan.sizes()
        if self._slab is not None and "kv" not in sizes:
            self._slab.discard()
        if self._slab is None or self._transfers is None or slab_bytes(sizes) > self._slab.nbytes:
            self._slab, self._transfers = self._renew(config, slab_bytes(sizes))
        self._slab.carve(sizes)
        return self._slab, self._transfers

    def _renew(self, config: InstanceConfig, nbytes: int) -> tuple[Slab, Transfers]:
        """A slab of at least `nbytes` in place of the one that there was, and what moves blocks in and out of it."""
        if self._transfers is not None:
            self._transfers.close()
        if self._slab is not None:
            self._slab.close()
        self._transfers = self._slab = None  # should the next lines fail
        slab = Slab(f"triptych-{config.id}", self._elastic_bytes(config, nbytes), config.model.device)
        return slab, Transfers(slab, config.id, self.near.epoch, config.transfer)

    def _elastic_bytes(self, config: InstanceConfig, nbytes: int) -> int:
        """Room for any role where that costs nothing, and where it is there."""
        if config.model.device != "cpu":
            return nbytes
        try:
            plan = plan_pools(replace(config, role=Role.EPD), self._layouts, self._max_model_len)
        except ConfigError:  # this role is served; that others could not be is told when one is asked for
            return nbytes
        most = max(nbytes, slab_bytes(plan.sizes()))
        return most if most <= available_bytes() else nbytes

    # ---- runners

    def _make_runners(self, slab: Slab, plan: PoolPlan) -> Runners:
        runners, rows = Runners(), None
        if plan.num_embedding_blocks:
            rows = EmbeddingRegion(slab.region_tensor("embedding"), plan.layouts.embedding, plan.num_embedding_blocks)
        if self._weights.encode is not None:
            assert rows is not None
            runners.encode = EncodeRunner(self._weights.encode, self._processor, rows)
        if self._weights.language is not None:
            kv = KVRegion(slab.region_tensor("kv"), plan.layouts.kv, plan.num_kv_blocks)
            eos_token_ids = sorted(self._processor.eos_token_ids)
            runners.language = LanguageRunner(self._weights.language, self._family, kv, rows, eos_token_ids)
        return runners


def _grey_picture() -> Media:
    file = io.BytesIO()
    Image.new("RGB", (WARM_UP_SIDE, WARM_UP_SIDE), (128, 128, 128)).save(file, "PNG")
    return Media(b"warm-up", "image", file.getvalue())


def _silence() -> Media:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(WARM_UP_RATE)
        sound.writeframes(bytes(2 * int(WARM_UP_SECONDS * WARM_UP_RATE)))
    return Media(b"warm-up", "audio", file.getvalue())


# What to encode first. Every family takes the one or the other.
_WARM_UP: Mapping[str, Callable[[], Media]] = {"image": _grey_picture, "audio": _silence}
