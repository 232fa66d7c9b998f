"""Attention of vision towers: by segments where pictures are packed into one row axis, else as in transformers."""

from dataclasses import dataclass
from functools import lru_cache
from inspect import signature

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from triptych.model.dense_attention import attend, prefers_products

TOWER_ATTENTION = "triptych_tower"
# Towers with packed segments hand them over whole (`cu_seq_lens_q`) only to a name that contains "flash".
SEGMENT_ATTENTION = "triptych_flash_segments"


def use_segment_attention(model: PreTrainedModel) -> None:
    """Switches towers that pack pictures of any size (known by their argument `grid_thw`) to `segment_attention`."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or module is model:
            continue
        if "grid_thw" in signature(module.forward).parameters:
            module.config._attn_implementation = SEGMENT_ATTENTION


def tower_attention(
    module: nn.Module,
    query: Tensor,  # [pictures, heads, rows, head_dim]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """[pictures, rows, heads, head_dim]."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and not causal and scaling is not None and prefers_products(query):
        return attend(query, key, value, scaling).transpose(1, 2), None
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return out, None


def segment_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, rows, head_dim]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Full attention inside each segment: [1, rows, heads, head_dim]. Segments of one length run as one batch."""
    heads, head_dim = query.shape[1], query.shape[3]
    plan = _segment_plan(tuple(cu_seq_lens_q.tolist()), str(query.device))
    outputs = []
    for length, rows in plan.groups:
        q, k, v = (x[0] if rows is None else x[0].index_select(1, rows) for x in (query, key, value))
        q, k, v = (x.reshape(heads, -1, length, head_dim).transpose(0, 1) for x in (q, k, v))
        outputs.append(attend(q, k, v, scaling).transpose(1, 2).reshape(-1, heads, head_dim))
    if plan.restore is None:
        return outputs[0][None], None
    return torch.cat(outputs).index_select(0, plan.restore)[None], None


@dataclass(frozen=True)
class _SegmentPlan:
    """Groups of equally long segments: (length, rows of all of them; None for all rows in order)."""

    groups: list[tuple[int, Tensor | None]]
    restore: Tensor | None  # puts the groups' outputs, one after the other, back in order


@lru_cache(maxsize=256)
def _segment_plan(bounds: tuple[int, ...], device: str) -> _SegmentPlan:
    starts, lengths = np.array(bounds[:-1]), np.diff(bounds)
    if (lengths == lengths[0]).all():
        return _SegmentPlan([(int(lengths[0]), None)], None)
    groups, order = [], []
    for length in np.unique(lengths):
        rows = (starts[lengths == length][:, None] + np.arange(length)).reshape(-1)
        groups.append((int(length), torch.from_numpy(rows).to(device)))
        order.append(rows)
    return _SegmentPlan(groups, torch.from_numpy(np.argsort(np.concatenate(order))).to(device))  # type: ignore[arg-type]


AttentionInterface.register(TOWER_ATTENTION, tower_attention)
AttentionMaskInterface.register(TOWER_ATTENTION, sdpa_mask)
AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
