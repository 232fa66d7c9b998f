"""Videos of InternVL: each frame is a picture of one tile, with its number in front."""

from torch import Tensor
from transformers import PreTrainedModel

from triptych.model.families.base import ItemLayout, Parts, Piece, Tensors, flatten, require_equal
from triptych.model.families.video import FrameArguments, Frames
from triptych.model.headers import VideoHeader

# Those of transformers' class, for checkpoints that bring none.
_DEFAULTS = FrameArguments(
    height=384,
    width=384,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
)


class InternVLVideo(Frames):
    """Its rows stand under the token of pictures, and its frames go where tiles go."""

    def __init__(
        self, arguments: FrameArguments, token: str, tokens_per_frame: int, *, placeholder: str, start: str, end: str
    ) -> None:
        super().__init__(arguments, token, tokens_per_frame, placeholder=placeholder)
        self._start, self._end = start, end

    @classmethod
    def read(cls, parts: Parts, token: str, *, side: int, tokens_per_frame: int, **texts: str) -> "InternVLVideo":
        arguments = FrameArguments.read(parts, _DEFAULTS)
        require_equal("height of videos", arguments.height, side)
        require_equal("width of videos", arguments.width, side)
        return cls(arguments, token, tokens_per_frame, **texts)

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
