"""Loads one half of a Hugging Face checkpoint, the encoders or the language model, or refuses with the reason.

Renaming and converting of checkpoint keys stays with transformers: a half is a subclass whose constructor drops the
other one, so that `from_pretrained` never reads a tensor of it.
"""

import contextlib
import copy
import enum
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from triptych.config import ModelConfig
from triptych.errors import ConfigError
from triptych.model.attention import PAGED_ATTENTION
from triptych.model.families import answering_part
from triptych.model.recurrent import hand_states_to_linear_layers
from triptych.model.tower_attention import TOWER_ATTENTION, use_segment_attention
from triptych.model.tuning import PackedLinear, tune

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Half(enum.Enum):
    """What encode runs, and what prefill and decode run. An instance of several stages holds both, one beside the
    other, so that a role switch keeps the one that both roles need."""

    ENCODE = enum.auto()  # towers and projectors
    LANGUAGE = enum.auto()  # decoder and output embeddings


class Absent(nn.Module):
    """Stands where a sub-module of the other half was: no parameters, no buffers, cannot be called."""

    def forward(self, *args: object, **kwargs: object) -> None:
        raise AssertionError("this is the other half of the model")


def resolve_checkpoint(model: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: `model` itself, or the hub's snapshot of that id."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")):
        raise ConfigError(f"model {model!r}: no such folder")
    from huggingface_hub import snapshot_download  # costs an import that a local folder does not need
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model {model!r}: neither a local folder nor a checkpoint on the hub ({reason})") from error


def load_config(path: str | Path) -> PreTrainedConfig:
    """Of the part that is served. Raises ConfigError where transformers cannot read it, or would need code from the
    checkpoint."""
    try:
        return answering_part(AutoConfig.from_pretrained(str(path)))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model {path}: {error}") from error


def resolve_dtype(config: ModelConfig, hf_config: PreTrainedConfig) -> torch.dtype:
    """The type of weights, KV and embeddings: equal on every instance, because it needs only the config."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    for source in (hf_config, hf_config.get_text_config()):
        if isinstance(source.dtype, torch.dtype):
            return source.dtype
    return torch.float32


def resolve_max_model_len(config: ModelConfig, hf_config: PreTrainedConfig) -> int:
    """Prompt + output tokens of one request: as asked, but never more than the positions the model was made for."""
    supported = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if config.max_model_len is None:
        if supported is None:
            raise ConfigError("max_model_len: the model's config names no limit, so one has to be given")
        return int(supported)
    if config.max_model_len < 1 or (supported is not None and config.max_model_len > supported):
        raise ConfigError(f"max_model_len: {config.max_model_len} is outside 1..{supported}, the model's positions")
    return config.max_model_len


def load_half(config: ModelConfig, half: Half) -> PreTrainedModel:
    """One half of the model of `config.path`, in evaluation mode.

    Raises ConfigError for an unknown class, a missing or misshapen tensor (named), and files that cannot be read.
    """
    hf_config = load_config(config.path)
    options: dict[str, Any] = {
        "config": hf_config,
        "dtype": resolve_dtype(config, hf_config),
        "attn_implementation": TOWER_ATTENTION if half is Half.ENCODE else PAGED_ATTENTION,
    }
    if config.device != "cpu" and find_spec("accelerate"):
        options["device_map"] = config.device  # straight to the device, without a copy of the part in host memory
    cls = _half_class(full_class(hf_config), half)
    with _quiet_transformers():
        model = (
            _random_model(cls, config, options) if config.load_format == "dummy" else _read_model(cls, config, options)
        )
    model.to(config.device).eval().requires_grad_(False)
    if half is Half.ENCODE:
        use_segment_attention(model)
    else:
        hand_states_to_linear_layers(model)
    tune(model)
    return model


def meta_half(hf_config: PreTrainedConfig, half: Half) -> PreTrainedModel:
    """The modules of a half without weights (on the meta device): enough to find shapes in a second."""
    with torch.device("meta"), _quiet_transformers():
        return _half_class(full_class(hf_config), half)(copy.deepcopy(hf_config)).eval()


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of parameters and buffers; tensors that share storage (tied embeddings) count once."""
    tensors = [*model.parameters(), *model.buffers()]
    plain = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    packed: int = sum(module.packed_bytes for module in model.modules() if isinstance(module, PackedLinear))
    return int(sum(plain.values())) + packed


def full_class(hf_config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that the checkpoint names. Raises ConfigError where transformers has none of that name."""
    name = (hf_config.architectures or [None])[0]
    cls = getattr(transformers, name, None) if name else None
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ConfigError(f"architecture {name!r}: no model class of transformers {transformers.__version__}")
    return cls


def _read_model(cls: type[PreTrainedModel], config: ModelConfig, options: dict[str, Any]) -> PreTrainedModel:
    try:
        model, info = cls.from_pretrained(config.path, output_loading_info=True, **options)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ConfigError(f"model {config.path}: {error}") from error
    missing = sorted(info["missing_keys"])  # transformers would fill them at random
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ConfigError(f"model {config.path}: tensors missing from the checkpoint: {', '.join(missing[:5])}{more}")
    return model


def _random_model(cls: type[PreTrainedModel], config: ModelConfig, options: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(config.seed)
    # With an empty state every key is missing, so transformers' own initialisation fills weights and rotary buffers.
    return cls.from_pretrained(None, state_dict={}, **options)


def _half_class(full: type[PreTrainedModel], half: Half) -> type[PreTrainedModel]:
    """A subclass that keeps the name, because transformers looks up the checkpoint conversion by it."""

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        full.__init__(self, config, *args, **kwargs)
        language, encode = _parts(self)
        if half is Half.LANGUAGE:
            _drop(self, encode)
        else:
            _drop(self, language)
            self._tied_weights_keys = None  # the tied embedding is gone
            self.all_tied_weights_keys = {}

    namespace: dict[str, Any] = {
        "__init__": __init__,
        "__module__": full.__module__,
        "_keys_to_ignore_on_load_unexpected": [".*"],  # the other half's tensors are expected in the file
    }
    if half is Half.ENCODE:
        namespace["_tied_weights_keys"] = None
    return type(full.__name__, (full,), namespace)


def _parts(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Names of the language sub-modules (decoder, output embeddings) and of the encode ones (all else in the base)."""
    decoder, head, base = model.get_decoder(), model.get_output_embeddings(), model.base_model
    if decoder is model or decoder is base:
        raise ConfigError(f"{type(model).__name__}: not a multimodal model (its decoder is the whole model)")
    names = {id(module): name for name, module in model.named_modules()}
    prefix = f"{names[id(base)]}." if names[id(base)] else ""
    language = [names[id(decoder)]] + ([names[id(head)]] if head is not None else [])
    encode = [prefix + name for name, module in base.named_children() if module is not decoder and module is not head]
    return language, encode


def _drop(model: PreTrainedModel, names: list[str]) -> None:
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Absent())


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice on standard error while a worker loads; the report of missing keys is ours."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
