"""Bodies of requests and responses, as OpenAI spells them, with vLLM's extra sampling fields.

Ranges stand here once: decoding enforces them, error texts and the OpenAPI document read them. Fields that nobody
knows are ignored, as OpenAI does; fields that would change the answer and are not supported are refused (`Refused`).
"""

from typing import Annotated, Any, ClassVar, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

MAX_SEED = (1 << 63) - 1

Unsupported = Annotated[Any, Meta(description="Not supported: refused with 400 unless null or neutral.")]
PositiveCount = Annotated[int, Meta(ge=1, le=1 << 31)]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
Logprobs = Annotated[int, Meta(ge=0, le=20)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
AudioFormat = Literal["wav", "mp3", "flac", "ogg", "opus", "aac", "m4a", "mp4", "webm", "aiff"]
Uuid = Annotated[str, Meta(min_length=1, max_length=1024)]
MAX_TIMEOUT_S = 86_400
MAX_STOP_TOKENS = 1024  # every sampled token is compared with each of them


# ---- requests


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(Struct):
    type: str


class Refused(Struct, kw_only=True):
    """Known fields that change the answer in ways this server cannot. `NEUTRAL` values change nothing."""

    NEUTRAL: ClassVar[tuple[object, ...]] = (None, False, "", [], {}, "none", "auto", ["text"])

    tools: Unsupported = None
    tool_choice: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    modalities: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    logit_bias: Unsupported = None
    logits_processors: Unsupported = None
    bad_words: Unsupported = None
    allowed_token_ids: Unsupported = None
    use_beam_search: Unsupported = None
    prompt_logprobs: Unsupported = None
    include_stop_str_in_output: Unsupported = None
    truncate_prompt_tokens: Unsupported = None
    structured_outputs: Unsupported = None
    guided_json: Unsupported = None
    guided_regex: Unsupported = None
    guided_choice: Unsupported = None
    guided_grammar: Unsupported = None
    mm_processor_kwargs: Unsupported = None
    chat_template: Unsupported = None
    documents: Unsupported = None
    suffix: Unsupported = None
    kv_transfer_params: Unsupported = None
    ec_transfer_params: Unsupported = None

    def refused_field(self) -> str | None:
        """The first field that asks for something unsupported."""
        for name in Refused.__struct_fields__:
            if getattr(self, name) not in self.NEUTRAL:
                return name
        return None


class GenerateRequest(Refused, kw_only=True):
    """What chat completions and completions have in common."""

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    max_tokens: PositiveCount | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=(1 << 31) - 1, description="-1 and 0: all tokens")] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.001, le=1000)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    timeout: Annotated[float, Meta(gt=0, le=MAX_TIMEOUT_S, description="Seconds, from the arrival on.")] | None = None
    user: str | None = None


class TextPart(Struct, tag_field="type", tag="text"):
    text: str


class MediaUrl(Struct):
    url: Annotated[str, Meta(description="data:, http:, https:, or file: where the server allows it.")] | None = None


class ImageUrl(MediaUrl):
    detail: str | None = None


class InputAudio(Struct):
    data: Annotated[str, Meta(description="The file in base64.")] | None = None
    format: AudioFormat | None = None


class MediaPart(Struct, tag_field="type", kw_only=True):
    """A picture, video or sound. With media and a `uuid` it gives them a name; with a `uuid` alone it means those."""

    MODALITY: ClassVar[str]

    uuid: Uuid | None = None

    @property
    def kind(self) -> str:
        """The part's type, which is also the name of the field with the media in it."""
        return str(self.__struct_config__.tag)


class ImagePart(MediaPart, tag="image_url"):
    MODALITY: ClassVar[str] = "image"

    image_url: ImageUrl | str | None = None


class VideoPart(MediaPart, tag="video_url"):
    MODALITY: ClassVar[str] = "video"

    video_url: MediaUrl | str | None = None


class AudioUrlPart(MediaPart, tag="audio_url"):
    MODALITY: ClassVar[str] = "audio"

    audio_url: MediaUrl | str | None = None


class InputAudioPart(MediaPart, tag="input_audio"):
    MODALITY: ClassVar[str] = "audio"

    input_audio: InputAudio | None = None


ContentPart = str | TextPart | ImagePart | VideoPart | AudioUrlPart | InputAudioPart
PART_TYPES = ("text", "image_url", "video_url", "input_audio", "audio_url")


class ChatMessage(Struct):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None
    tool_calls: Unsupported = None


Messages = Annotated[list[ChatMessage], Meta(min_length=1)]


class VideoIo(Struct, forbid_unknown_fields=True):
    """Which frames the model sees, evenly spread: at most `num_frames` (if left out 32), and at most `fps` a second."""

    num_frames: Annotated[int, Meta(ge=-1, le=1 << 20, description="-1: no bound.")] | None = None
    fps: Annotated[float, Meta(ge=-1, le=1000, description="-1: no bound.")] | None = None


class NoOptions(Struct, forbid_unknown_fields=True):
    """Of pictures and sounds."""


class MediaIoKwargs(Struct, forbid_unknown_fields=True):
    """How media are read, by modality."""

    image: NoOptions | None = None
    video: VideoIo | None = None
    audio: NoOptions | None = None


class ChatRequest(GenerateRequest, kw_only=True):
    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    media_io_kwargs: MediaIoKwargs | None = None
    max_completion_tokens: PositiveCount | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None


class CompletionRequest(GenerateRequest, kw_only=True):
    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool | None = None
    logprobs: Logprobs | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    add_special_tokens: bool | None = None


class TokenizeRequest(Struct, kw_only=True):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    media_io_kwargs: MediaIoKwargs | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, kw_only=True):
    tokens: list[TokenId]
    model: str | None = None


class RoleRequest(Struct, kw_only=True):
    role: Annotated[str, Meta(description="e, p, d, ep, pd, ed or epd")]


class PlacementRequest(Struct, kw_only=True):
    placement: Annotated[str, Meta(description="Counts and roles, such as 2e1p1d; every stage needs an instance.")]


# ---- responses


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    content: list[ChatTokenLogprob]


class AnswerMessage(Struct, frozen=True):
    role: str
    content: str


class ChatChoice(Struct, frozen=True):
    index: int
    message: AnswerMessage
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None
    stop_reason: int | str | None = None


class ChatResponse(Struct, frozen=True, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Struct, frozen=True, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChatChunkChoice(Struct, frozen=True, gc=False):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET


class ChatChunk(Struct, frozen=True, kw_only=True, gc=False):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class CompletionLogprobs(Struct, frozen=True):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Struct, frozen=True, gc=False):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class CompletionResponse(Struct, frozen=True, kw_only=True, gc=False):
    """Also the shape of a chunk of a stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "triptych"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[ModelCard]


class TokenizeResponse(Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(Struct, frozen=True):
    prompt: str


class VersionResponse(Struct, frozen=True):
    version: str


class PoolView(Struct, frozen=True):
    total: int
    free: int
    used: int
    cached: int


class SwitchView(Struct, frozen=True, kw_only=True):
    """A change of an instance's role; `after` is null where it is to end. Times are in seconds, `at` since 1970."""

    before: str
    after: str | None
    at: float
    state: Literal["running", "done", "failed"]
    steps_s: dict[str, float]
    error: str | None


class InstanceView(Struct, frozen=True, kw_only=True):
    """One instance as `GET /cluster` shows it. Cached blocks are reusable: neither used nor leaked.

    starting: loading; active: takes work; leaving: finishes what it has, to change its role or to end; restarting: was
    lost, and waits to be started again. `started_at` is in seconds since 1970, `switch` the newest change of its role.
    """

    id: str
    pid: int | None
    role: str
    state: str
    epoch: str | None
    restarts: int
    last_failure: str | None
    started_at: float | None
    uptime_s: float | None
    switch: SwitchView | None
    queues: dict[str, int]
    pools: dict[str, PoolView]
    counters: dict[str, float]


class EventView(Struct, frozen=True, kw_only=True):
    """What happened to the cluster or to one instance. `at` is in seconds since 1970."""

    at: float
    what: str
    instance: str | None
    text: str
    numbers: dict[str, float]


class ClusterView(Struct, frozen=True, kw_only=True):
    """`events` are the newest of each sort, in order; `draining` while the server finishes what it has before it stops;
    `decision` is the latest about roles that follow the load, with its numbers."""

    placement: str
    draining: bool
    instances: list[InstanceView]
    decision: dict[str, Any] | None
    events: list[EventView]


class RoleResponse(Struct, frozen=True, kw_only=True):
    """Seconds of each step; none if the instance had that role already."""

    id: str
    role: str
    steps_s: dict[str, float]


class ChangeView(Struct, frozen=True, kw_only=True):
    """What was done to one instance: `before` is null for a new one, `after` for one that ended."""

    id: str
    before: str | None
    after: str | None
    steps_s: dict[str, float]


class PlacementResponse(Struct, frozen=True, kw_only=True):
    """The changes in the order in which they were made."""

    placement: str
    changes: list[ChangeView]
    total_s: float


class ErrorBody(Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Struct, frozen=True):
    error: ErrorBody
