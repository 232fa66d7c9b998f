"""Videos of LLaVA-OneVision: each frame is a tile with its features pooled, and one newline row ends the video."""

from torch import Tensor

from triptych.model.families.base import ItemLayout, Parts, Rows, Tensors
from triptych.model.families.video import FrameArguments, Frames
from triptych.model.headers import VideoHeader


class OnevisionVideo(Frames):
    """Every unit is a video of one frame to the model, so that each has a newline row; the last one's is used."""

    @classmethod
    def read(cls, parts: Parts, token: str, *, side: int, patches: int) -> "OnevisionVideo":
        """`patches`: features of a tile, up and across; pooling halves that, rounding up."""
        return cls(FrameArguments.read_squares(parts, side), token, (-(-patches // 2)) ** 2)

    def _lay_out(self, header: VideoHeader, num_items: int) -> ItemLayout:
        length, num_frames = self._tokens_per_frame, len(header.frames)
        rows = [*(Rows(index, 0, length) for index in range(num_frames - 1)), Rows(num_frames - 1, 0, length + 1)]
        return self.item([num_frames * length + 1], [length + 1] * num_frames, rows)

    def inputs(self, prepared: Tensor, index: int) -> Tensors:
        return {"pixel_values_videos": self.settings.normalised(prepared[index : index + 1])[None]}
