"""A whole server over instances that answer by a script: all of it is real but for the three instances. They can be
lost and come back."""

import asyncio
import base64
import io
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import msgspec
from openai import OpenAI
from PIL import Image

from tests.checkpoints import make_checkpoint
from tests.model.clips import decode_frames
from tests.server.clips import SAMPLING_RATE
from tests.server.senses import senses
from triptych.config import AdmissionConfig, ServerConfig
from triptych.core import FinishReason, InstanceId, Media, RequestId, Role, TokenLogprobs, UnitHash
from triptych.errors import RequestError
from triptych.messages import (
    Abort,
    AnyMessage,
    Encode,
    Failed,
    Load,
    Located,
    Peer,
    PoolUsage,
    SlabDescription,
    Submit,
    Table,
    Tokens,
    TokenUpdate,
    Wanted,
)
from triptych.model.audios import decode_audio
from triptych.model.images import decode_image
from triptych.model.processor import Processor
from triptych.router.clock import LoopClock
from triptych.router.ledger import Ledger, Reservation
from triptych.server.app import create_app
from triptych.server.frontend import Frontend
from triptych.server.running import bind, make_http_server
from triptych.telemetry import Telemetry

E, P, D = InstanceId("e0"), InstanceId("p0"), InstanceId("d0")
ANSWER = "Hello, wörld 👋!"
COUNTERS = {
    E: {"encode_units_computed": 7.0, "encode_units_cached": 2.0, "embedding_hits": 2.0, "embeddings_evicted": 1.0},
    P: {"encode_units_transferred": 5.0, "encode_units_prefix": 3.0, "prefix_queries": 90.0, "prefix_hits": 40.0},
    D: {"prefix_queries": 10.0, "prefix_hits": 8.0, "decode_offloads": 4.0},
}


@cache
def processor() -> Processor:
    """That of a tiny checkpoint: byte-level tokens, pictures of 4 to 24 tokens, and no other media."""
    return Processor.load(_checkpoint())


def all_media() -> Processor:
    """One that takes pictures, videos and sounds."""
    return senses(_checkpoint())


@cache
def _checkpoint() -> Path:
    return make_checkpoint("qwen2_vl", Path(tempfile.mkdtemp(prefix="checkpoint-server-")))


def ids(text: str) -> list[int]:
    return processor().encode(text, add_special_tokens=False)


_processor = processor


def script(order: Submit) -> list[int]:
    return ids(ANSWER)


def end_id() -> int:
    return min(processor().eos_token_ids)


M = TypeVar("M")
Answer = Callable[[Submit], list[int]]


@dataclass
class Job:
    order: Submit
    missing: set[UnitHash]
    script: deque[int]
    index: int  # of the next token: behind the output that it was submitted with


class FakeCluster:
    """One E, one P and one D that follow the protocol, on the event loop of the frontend.

    `answer` says which tokens a prompt gets. Each turn of the loop is a step: one token for every sequence.
    """

    def __init__(self, answer: Answer, step_s: float = 0.0) -> None:
        self.answer = answer
        self.end_id = end_id()
        self.step_s = step_s
        self.frozen = False  # takes orders, but does no work
        self.sent: list[tuple[InstanceId, AnyMessage]] = []
        self.aborted: list[tuple[InstanceId, RequestId]] = []
        self.num_cached = 0  # prompt tokens that every prefill says it had
        self.prefilling: dict[RequestId, Job] = {}
        self.decoding: dict[RequestId, Job] = {}
        self._encoding: dict[UnitHash, RequestId] = {}
        self._put_off: list[Encode] = []  # orders that came while it was frozen
        self._embedded: set[UnitHash] = set()  # on P
        self._peers: list[Peer] = []
        self._version = 0
        self._frontend: Frontend | None = None
        self._stepping: asyncio.TimerHandle | asyncio.Handle | None = None

    def connect(self, frontend: Frontend, roles: dict[InstanceId, Role] | None = None) -> None:
        self._frontend = frontend
        roles = {E: Role.E, P: Role.P, D: Role.D} if roles is None else roles
        slab = SlabDescription({}, "", "cpu", 0, {})
        self._publish([Peer(id, role, "epoch", "", slab) for id, role in roles.items()])
        for id in roles:
            queues = {"prefill_waiting": 1, "prefill_running": 2} if id == P else {}
            pools = {"kv": PoolUsage(10, 5, 3, 2)} if id != E else {"embedding": PoolUsage(4, 4, 0, 0)}
            frontend.handle(Load(id, queues, pools, {}, COUNTERS.get(id, {}), {}))

    def lose(self, id: InstanceId, suspects: Collection[RequestId] = ()) -> None:
        """It is gone, with everything that it held."""
        self._publish([peer for peer in self._peers if peer.id != id])
        if id == E:
            self._encoding.clear()
        if id == P:
            self.prefilling.clear()
            self._embedded.clear()
        if id == D:
            self.decoding.clear()
        assert self._frontend is not None
        self._frontend.instance_lost(id, suspects)

    def restore(self, id: InstanceId, role: Role, epoch: str = "later") -> None:
        self._publish([*self._peers, Peer(id, role, epoch, "", SlabDescription({}, "", "cpu", 0, {}))])

    def thaw(self) -> None:
        """Does what it was asked for while it was frozen."""
        self.frozen = False
        orders, self._put_off = self._put_off, []
        for order in orders:
            self._encode(order)
        self._schedule()

    @property
    def idle(self) -> bool:
        return not self.prefilling and not self.decoding

    def send(self, instance: InstanceId, message: AnyMessage) -> None:
        self.sent.append((instance, message))
        match message:
            case Encode():
                self._encoding |= {unit.hash: message.request_id for unit in message.units}
                asyncio.get_running_loop().call_soon(self._encode, message)
            case Submit():
                missing = {unit.hash for unit in message.units} - self._embedded
                script = deque(self._script(message))
                self.prefilling[message.request_id] = Job(message, missing, script, _num_output(message))
                asyncio.get_running_loop().call_soon(self._ask_for_missing)
                self._schedule()
            case Abort():
                self.aborted.append((instance, message.request_id))
                if instance == E:
                    self._encoding = {u: id for u, id in self._encoding.items() if id != message.request_id}
                if instance == P:
                    self.prefilling.pop(message.request_id, None)
                if instance == D:
                    self.decoding.pop(message.request_id, None)

    def orders(self, kind: type[M]) -> list[M]:
        """What was sent since `sent` was cleared."""
        return [message for _, message in self.sent if isinstance(message, kind)]

    def _encode(self, order: Encode) -> None:
        if self.frozen:
            self._put_off.append(order)
            return
        units = {unit.hash for unit in order.units if self._encoding.pop(unit.hash, None) is not None}
        try:
            _decode(order.media)
        except RequestError as error:
            self._tell(Failed(order.request_id, str(error), error.status, error.code, order.units[0].hash))
            self._ask_for_missing()
            return
        self._embedded |= units
        for job in self.prefilling.values():
            job.missing -= units
        self._schedule()

    def _ask_for_missing(self) -> None:
        """What nobody is about to encode has been lost, or has failed for the request that ordered it."""
        for id, job in list(self.prefilling.items()):
            missing = sorted(job.missing - self._encoding.keys())
            if missing:
                self._tell(Wanted(id, tuple(missing)))

    def _schedule(self) -> None:
        if self._stepping is None:
            self._stepping = asyncio.get_running_loop().call_later(self.step_s, self._step)

    def _step(self) -> None:
        self._stepping = None
        if self.frozen:
            return
        ready = [id for id, job in self.prefilling.items() if not job.missing]
        first = [self._sample(self.prefilling[id]) for id in ready]
        more = [self._sample(job) for job in self.decoding.values()]
        for id, update in zip(ready, first, strict=True):
            job = self.prefilling.pop(id)
            if update.finish is None:
                self.decoding[id] = job
                self._tell(Located(id, D))
        for update in more:
            if update.finish is not None:
                del self.decoding[update.request_id]
        if first:
            self._tell(Tokens(P, first))
        if more:
            self._tell(Tokens(D, more))
        if self.decoding or any(not job.missing for job in self.prefilling.values()):
            self._schedule()

    def _sample(self, job: Job) -> TokenUpdate:
        sampling = job.order.sampling
        index = job.index
        job.index += 1
        token = job.script.popleft() if job.script else self.end_id
        num_left = sampling.max_tokens - job.index
        finish = None
        if (token == self.end_id and not sampling.ignore_eos) or token in sampling.stop_token_ids:
            finish = FinishReason.STOP
        elif num_left <= 0:
            finish = FinishReason.LENGTH
        scores = None
        if sampling.logprobs is not None:
            top = [token, (token + 1) % 256][: sampling.logprobs]
            scores = TokenLogprobs(-0.5, top, [-0.5, -1.5][: sampling.logprobs])
        return TokenUpdate(job.order.request_id, token, index, finish, scores, self.num_cached if index == 0 else 0)

    def _script(self, order: Submit) -> list[int]:
        """The rest of the answer, behind the output that the order comes with."""
        prompt = msgspec.structs.replace(order, token_ids=order.token_ids[: order.num_prompt_tokens])
        return self.answer(prompt)[_num_output(order) :]

    def _publish(self, peers: list[Peer]) -> None:
        self._peers = peers
        self._version += 1
        self._tell(Table(self._version, peers))

    def _tell(self, message: AnyMessage) -> None:
        assert self._frontend is not None
        self._frontend.handle(message)


def _num_output(order: Submit) -> int:
    return len(order.token_ids) - order.num_prompt_tokens


def _decode(media: Media) -> None:
    match media.modality:
        case "image":
            decode_image(media.data)
        case "video":
            decode_frames(media.data, media.frames)
        case "audio":
            decode_audio(media.data, SAMPLING_RATE)


class Stack:
    """A whole server in a thread: real HTTP, frontend and processor, fake instances."""

    def __init__(
        self,
        answer: Answer = script,
        *,
        processor: Processor | None = None,
        step_s: float = 0.0,
        max_model_len: int = 512,
        admission: AdmissionConfig | None = None,
        **changes: Any,
    ) -> None:
        """`changes` go into the server's configuration."""
        processor = processor or _processor()
        self.config = ServerConfig(**({"served_model_names": ("fake",)} | changes))
        self.telemetry = Telemetry("fake")
        self.cluster = FakeCluster(answer, step_s)
        self.frontend = Frontend(processor, self.cluster, self.telemetry, admission=admission)
        app = create_app(
            self.frontend,
            processor,
            self.config,
            self.telemetry,
            max_model_len=max_model_len,
            model_root="/models/fake",
        )
        self._server = make_http_server(app)
        self._socket = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        key = self.config.api_key
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self.http = httpx.Client(base_url=self.url, timeout=10, headers=headers)
        self.openai = OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.http.close()
        self.openai.close()
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()
        assert not self._thread.is_alive()

    def chat(self, **fields: Any) -> httpx.Response:
        """A request with one short message, but for what `fields` say."""
        body = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0} | fields
        return self.http.post("/v1/chat/completions", json=body)

    def wait_until_idle(self) -> None:
        """Every instance and the frontend forgot every request, and nothing is held of any, within a second."""
        deadline = time.monotonic() + 1
        while not (self.cluster.idle and num_live(self.frontend) == 0 and self.frontend.ledger.num_bytes == 0):
            assert time.monotonic() < deadline, (
                self.cluster.prefilling,
                self.cluster.decoding,
                num_live(self.frontend),
                self.frontend.ledger.num_bytes,
            )
            time.sleep(0.005)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.cluster.connect(self.frontend)
        serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            await asyncio.sleep(0.005)
        self._started.set()
        await serving


def num_live(frontend: Frontend) -> int:
    """Sequences that it has not forgotten."""
    return sum(map(len, frontend._requests.open.values()))


def reservation() -> Reservation:
    """That nothing bounds."""
    return Ledger(1 << 40, LoopClock()).reserve()


def picture(width: int = 32, height: int = 32, colour: str = "red", kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, kind)
    return out.getvalue()


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def video_part(data: bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url(data, "video/mp4")}}


def audio_part(data: bytes) -> dict[str, Any]:
    return {"type": "audio_url", "audio_url": {"url": data_url(data, "audio/wav")}}


def input_audio_part(data: bytes, format: str = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": format}}
