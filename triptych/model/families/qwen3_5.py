"""Qwen3.5, dense and with experts: pictures as in Qwen3-VL, without deepstack; most layers of its text model are
linear-attention ones."""

from typing import ClassVar

from triptych.model.families.qwen_vl import QwenVL


class Qwen35(QwenVL):
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_5", "qwen3_5_moe")
    linear_attention = True
