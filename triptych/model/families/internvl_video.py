"""Videos of InternVL: each frame is a picture of one tile, with its number in front."""

from torch import Tensor
from transformers import PreTrainedModel

from triptych.model.families.base import ItemLayout, Parts, Piece, Tensors, flatten
from triptych.model.families.video import FrameArguments, Frames
from triptych.model.headers import VideoHeader


class InternVLVideo(Frames):
    """Its rows stand under the token of pictures, and its frames go where tiles go."""

    def __init__(
        self, arguments: FrameArguments, token: str, tokens_per_frame: int, *, placeholder: str, start: str, end: str
    ) -> None:
        super().__init__(arguments, token, tokens_per_frame, placeholder=placeholder)
        self._start, self._end = start, end

    @classmethod
    def read(cls, parts: Parts, token: str, *, side: int, tokens_per_frame: int, **texts: str) -> "InternVLVideo":
        return cls(FrameArguments.read_squares(parts, side), token, tokens_per_frame, **texts)

    def _lay_out(self, header: VideoHeader, num_items: int) -> ItemLayout:
        pieces: list[Piece] = []
        for number in range(1, len(header.frames) + 1):
            pieces += [f"Frame{number}: {self._start}", self._tokens_per_frame, f"{self._end}\n"]
        pieces[-1] = self._end
        return self.item(pieces, [self._tokens_per_frame] * len(header.frames))

    def inputs(self, prepared: Tensor, index: int) -> Tensors:
        return {"pixel_values": self.settings.normalised(prepared[index : index + 1])}

    def features(self, model: PreTrainedModel, inputs: Tensors) -> Tensor:
        return flatten(model.base_model.get_image_features(**inputs, return_dict=True).pooler_output)
