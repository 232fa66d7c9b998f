"""Videos of LLaVA-OneVision: each frame is a tile with its features pooled, and one newline row ends the video."""

from typing import Any

from torch import Tensor

from triptych.model.families.base import ItemLayout, Parts, Rows, Tensors, require_equal
from triptych.model.families.video import FrameArguments, Frames
from triptych.model.headers import VideoHeader

# Those of transformers' class, for checkpoints that bring none.
_DEFAULTS = FrameArguments(
    height=384,
    width=384,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
)


class OnevisionVideo(Frames):
    """Every unit is a video of one frame to the model, so that each has a newline row; the last one's is used."""

    @classmethod
    def read(cls, parts: Parts, token: str, *, side: int, patches: int) -> "OnevisionVideo":
        """`patches`: features of a tile, up and across; pooling halves that, rounding up."""
        arguments: Any = FrameArguments.read(parts, _DEFAULTS)
        require_equal("height of videos", arguments.height, side)
        require_equal("width of videos", arguments.width, side)
        return cls(arguments, token, (-(-patches // 2)) ** 2)

    def _lay_out(self, header: VideoHeader, num_items: int) -> ItemLayout:
        length, num_frames = self._tokens_per_frame, len(header.frames)
        rows = [*(Rows(index, 0, length) for index in range(num_frames - 1)), Rows(num_frames - 1, 0, length + 1)]
        return self.item([num_frames * length + 1], [length + 1] * num_frames, rows)

    def inputs(self, prepared: Tensor, index: int) -> Tensors:
        return {"pixel_values_videos": self.settings.normalised(prepared[index : index + 1])[None]}
