"""Real engines in one process, without a model: real sockets, slabs, transfers, and runners that write checkable bytes.

An encoded unit is its hash byte by byte; the KV of a token is its id; the next token is the sum of all KV before it.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import zmq
from msgspec.structs import replace

from tests.builders import BLOCK_TOKENS, make_config, make_media
from triptych.config import InstanceConfig, SchedulingConfig
from triptych.core import Chunk, EncodeUnit, EncodeWork, InstanceId, Role, SampledToken, Sequence
from triptych.engine.engine import Engine
from triptych.engine.equipment import Equipment, Runners
from triptych.engine.sockets import Inbox, Post
from triptych.errors import ConfigError, RequestError
from triptych.memory.embedding_cache import EmbeddingCache
from triptych.memory.kv_cache import KVCache
from triptych.memory.leases import Leases
from triptych.memory.pools import Pools
from triptych.messages import AnyMessage, Encode, Failed, Submit, Switched, SwitchRole, Table, Tokens
from triptych.stages.base import Surroundings
from triptych.stages.group import StageGroup
from triptych.transfer.select import Transfers
from triptych.transfer.slab import Slab, slab_bytes

NUM_BLOCKS = 32
REGIONS = {"kv": (BLOCK_TOKENS * 8, NUM_BLOCKS, "kv"), "embedding": (BLOCK_TOKENS * 8, NUM_BLOCKS, "embedding")}
UNDECODABLE = b"not a picture"


class Rows:
    """A region as one 64-bit number per token."""

    def __init__(self, slab: Slab, region: str) -> None:
        self.values = slab.region_tensor(region).view(torch.int64).view(NUM_BLOCKS, BLOCK_TOKENS)

    def put(self, blocks: list[int], index: int, value: int) -> None:
        self.values[blocks[index // BLOCK_TOKENS], index % BLOCK_TOKENS] = value

    def get(self, blocks: list[int], index: int) -> int:
        return int(self.values[blocks[index // BLOCK_TOKENS], index % BLOCK_TOKENS])


def row_value(unit: EncodeUnit, row: int) -> int:
    return int.from_bytes(hashlib.blake2b(unit.hash + bytes([row]), digest_size=4).digest(), "little")


def next_token(values: list[int]) -> int:
    return sum(values) % 1000


def expected_answer(order: Submit) -> list[int]:
    """What the engines say if every byte arrives."""
    values = list(order.token_ids)
    for span in order.spans:
        rows = range(span.offset, span.offset + span.length)
        values[span.start : span.start + span.length] = [row_value(order.units[span.unit], row) for row in rows]
    for _ in range(order.sampling.max_tokens):
        values.append(next_token(values))
    return values[len(order.token_ids) :]


class EncodeRunner:
    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def run(self, works: list[EncodeWork]) -> list[RequestError | None]:
        return [self._encode(work) for work in works]

    def _encode(self, work: EncodeWork) -> RequestError | None:
        if work.media.data == UNDECODABLE:
            return RequestError("undecodable", code="invalid_image")
        for row in range(work.unit.num_tokens):
            self._rows.put(work.blocks, row, row_value(work.unit, row))
        return None


class LanguageRunner:
    def __init__(self, kv: Rows, embeddings: Rows) -> None:
        self._kv = kv
        self._embeddings = embeddings

    def run(self, chunks: list[Chunk]) -> list[SampledToken]:
        return [token for chunk in chunks if (token := self._run(chunk)) is not None]

    def offload(self, blocks: list[int]) -> torch.Tensor:
        return self._kv.values[blocks].clone()

    def restore(self, saved: torch.Tensor, blocks: list[int]) -> None:
        self._kv.values[blocks] = saved

    def _run(self, chunk: Chunk) -> SampledToken | None:
        sequence, end = chunk.sequence, chunk.start + chunk.length
        for position in range(chunk.start, end):
            self._kv.put(sequence.block_table, position, self._value(chunk, sequence, position))
        if not chunk.samples:
            return None
        return SampledToken(next_token([self._kv.get(sequence.block_table, position) for position in range(end)]))

    def _value(self, chunk: Chunk, sequence: Sequence, position: int) -> int:
        for span in sequence.spans:
            if span.start <= position < span.start + span.length:
                row = position - span.start + span.offset
                return self._embeddings.get(chunk.embedding_blocks[span.unit], row)
        return sequence.token_ids[position]


class Hops:
    """The engines of a placement and the frontend's mailbox. `settle` turns all of them until nothing happens."""

    def __init__(self, placement: dict[str, str], folder: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._folder = folder
        self._inbox = Inbox(self._context, f"ipc://{folder}/frontend")
        self._post = Post(self._context)
        self._by_name = {
            InstanceId(name): self._build(InstanceId(name), Role(role)) for name, role in placement.items()
        }
        self.peers = {name: engine.peer for name, engine in self._by_name.items()}
        self.received: list[AnyMessage] = []
        self._unfit: set[tuple[str, Role]] = set()
        self._version = self._order = 0
        self.publish()
        self.settle()

    @property
    def engines(self) -> list[Engine]:
        return list(self._by_name.values())

    def add(self, name: str, role: str) -> None:
        """One more instance."""
        engine = self._by_name[InstanceId(name)] = self._build(InstanceId(name), Role(role))
        self.peers[InstanceId(name)] = engine.peer
        self.publish()

    def refuse_to_fit(self, name: str, role: Role) -> None:
        """From now on there is no memory for that role."""
        self._unfit.add((name, role))

    def hold_up(self, name: str, seconds: float) -> None:
        """Each of its steps takes at least that long from now on."""
        engine = self._by_name[InstanceId(name)]
        step = engine.step

        def slow() -> bool:
            busy = step()
            time.sleep(seconds)
            return busy

        engine.step = slow  # type: ignore[method-assign]

    def has_ended(self, name: str) -> bool:
        return self._by_name[InstanceId(name)].has_ended

    def publish(self, leaving: str = "") -> None:
        """A table of all instances, one of which takes no new work."""
        self._version += 1
        table = [replace(peer, leaving=peer.id == leaving) for peer in self.peers.values()]
        for peer in table:
            self._post.send(peer.address, Table(self._version, table))

    def order_switch(self, name: str, role: str | None, room: dict[str, int] | None = None) -> None:
        """What a controller does first; `room` in blocks of other instances that decode. None: drain and end."""
        self._order += 1
        self.publish(leaving=name)
        config = None if role is None else self._config(name, role)
        blocks = {InstanceId(other): count for other, count in (room or {}).items()}
        self.send(name, SwitchRole(self._order, config, blocks))

    def take_up(self, name: str) -> Switched:
        """What it does when the instance says that it is done: the table has it again, in its role."""
        (said,) = [m for m in self.received if isinstance(m, Switched) and m.order == self._order]
        assert said.instance == name
        self.peers[said.instance] = said.peer
        self.publish()
        self.settle()
        return said

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            for engine in self.engines:
                engine.turn(wait_s=0.001)
            self.received += self._inbox.receive()

    def turn_until(self, done: Callable[[], bool]) -> None:
        for _ in range(1000):
            if done():
                return
            self.turn()
        raise AssertionError("1000 turns, and it is still not so")

    def send(self, to: str, message: AnyMessage) -> None:
        self._post.send(self.peers[InstanceId(to)].address, message)

    def ask(self, order: Submit, prefill: str, encode: str, data: bytes = b"jpeg") -> None:
        self.send(prefill, order)
        for unit in {unit.hash: unit for unit in order.units}.values():
            self.send(encode, Encode(order.request_id, make_media(data), (unit,), InstanceId(prefill)))

    def settle(self, quiet_turns: int = 15) -> None:
        """Sockets and pull threads take their time: idle means that nothing happened in several turns."""
        quiet = 0
        while quiet < quiet_turns:
            busy = [engine.turn(wait_s=0.001) for engine in self.engines]
            self.received += self._inbox.receive()
            pulling = any(engine.num_pulls for engine in self.engines)
            quiet = 0 if any(busy) or pulling else quiet + 1

    def tokens_of(self, order: Submit) -> list[int]:
        updates = [update for message in self.received if isinstance(message, Tokens) for update in message.updates]
        mine = {update.index: update.token_id for update in updates if update.request_id == order.request_id}
        return [mine[index] for index in sorted(mine)]

    def failures(self) -> list[Failed]:
        return [message for message in self.received if isinstance(message, Failed)]

    def assert_idle(self) -> None:
        for engine in self.engines:
            engine.check_integrity()
            load = engine.load()
            assert not any(load.queues.values()), f"{load.instance}: {load.queues}"
            assert all(pool.used == 0 for pool in load.pools.values()), f"{load.instance}: {load.pools}"

    def counter(self, instance: str, name: str) -> float:
        loads = [engine.load() for engine in self.engines]
        return next(load.counters.get(name, 0.0) for load in loads if load.instance == instance)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        self._post.close()
        self._inbox.close()
        self._context.term()

    def _build(self, name: InstanceId, role: Role) -> Engine:
        slab = Slab(f"test-{name}", slab_bytes(REGIONS))
        slab.carve(REGIONS)
        near = Surroundings(name, epoch=f"epoch-{name}")
        transfers = Transfers(slab, name, near.epoch, "shm")

        def refit(config: InstanceConfig) -> Equipment:
            if (name, config.role) in self._unfit:
                raise ConfigError("no memory")
            return equip(near, slab, transfers, config)

        return Engine(
            near,
            equip(near, slab, transfers, self._config(name, role)),
            Inbox(self._context, f"ipc://{self._folder}/{name}"),
            Post(self._context),
            refit=refit,
        )

    def _config(self, name: str, role: Role | str) -> InstanceConfig:
        scheduling = SchedulingConfig(max_num_seqs=8, max_num_batched_tokens=16, max_encode_tokens=64)
        config = make_config(name, role)
        return replace(config, frontend=self._inbox.address, heartbeat_s=60.0, scheduling=scheduling)


def equip(near: Surroundings, slab: Slab, transfers: Transfers, config: InstanceConfig) -> Equipment:
    """For a role, over a slab that is carved in the same way for all of them."""
    pools = Pools(Leases(), KVCache(NUM_BLOCKS, BLOCK_TOKENS), EmbeddingCache(NUM_BLOCKS, BLOCK_TOKENS))
    stages = StageGroup(config.role, near, pools, config.scheduling)
    rows = Rows(slab, "embedding")
    runners = Runners(EncodeRunner(rows), LanguageRunner(Rows(slab, "kv"), rows))
    return Equipment(config, pools, stages, runners, transfers)


@contextmanager
def hops(folder: Path, **placement: str) -> Iterator[Hops]:
    """`hops(tmp_path, e0="e", p0="p", d0="d")`. Everything is idle again when the block is left."""
    engines = Hops(placement, folder)
    try:
        yield engines
        engines.settle()
        engines.assert_idle()
    finally:
        engines.close()
