"""How long things take on one instance, as few coefficients: what stands in for `runner.run` and for the links."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from triptych.core import Chunk, EncodeWork, Role, Stage
from triptych.planning.workloads.demand import Demand, Item

# The costs that a step of each stage pays.
ENCODE = ("encode_step", "encode_item", "encode_pixel", "encode_unit", "encode_row", "encode_pair")
PREFILL = ("prefill_step", "prefill_sequence", "prefill_token", "prefill_pair")
DECODE = ("decode_step", "decode_sequence", "decode_few", "decode_context")
FEW = 8  # rows up to which a matrix product on a CPU costs more with each one than beyond
STAGES = {"encode": ENCODE, "prefill": PREFILL, "decode": DECODE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds unless the name says otherwise. A step takes its fixed part and so much for each of what is in it."""

    encode_step: float = 0.0
    encode_item: float = 0.0  # of a media item, for each instance that encodes some of its units
    encode_pixel: float = 0.0  # of its source: reading, resizing
    encode_unit: float = 0.0
    encode_row: float = 0.0
    encode_pair: float = 0.0  # of a row with one of its unit: towers that look at whole pictures
    prefill_step: float = 0.0
    prefill_sequence: float = 0.0
    prefill_token: float = 0.0
    prefill_pair: float = 0.0  # of a token with one that it looks at
    decode_step: float = 0.0
    decode_sequence: float = 0.0
    decode_few: float = 0.0  # more, of each of the first few sequences
    decode_context: float = 0.0  # for each token of context of each sequence
    turn: float = 0.0  # of an instance that takes messages and computes nothing; in steps it is included
    wake: float = 0.0  # more of the first step after a rest, or after another stage: other things fill the caches
    encode_crowding: float = 0.0  # more of a step, as a share of it, for each core of another instance that works
    prefill_crowding: float = 0.0
    decode_crowding: float = 0.0
    arrival: float = 0.0  # before a request is dispatched: HTTP, fetching media, preprocessing
    message: float = 0.0005
    transfer: float = 0.001  # of a pull without its bytes
    bytes_per_second: float = 10e9  # into one instance
    kv_token_bytes: int = 0
    embedding_row_bytes: int = 0
    host_bytes_per_second: float = inf  # KV that goes to host memory and back, where decode is short of blocks
    switch_weights: float = 0.7  # a role switch that changes which half of the model is loaded
    switch_books: float = 0.05  # one that keeps it
    cores: float = inf  # that all processes share; infinite: every instance has a device of its own
    threads: int = 1  # that share the work of a step, where cores are shared
    server_request: float = 0.0  # of the server process, which is one core's at most, as the next seven
    server_prompt_token: float = 0.0
    server_item: float = 0.0  # of a media item, beside its bytes
    server_media_byte: float = 0.0
    server_step: float = 0.0  # of what a step of an instance sampled, beside each token
    server_token: float = 0.0
    server_peer: float = 0.0  # of a request, for each instance that there is: the router looks at them all
    server_report: float = 0.0  # of whatever else an instance says
    client_request: float = 0.0  # of a load generator on the same machine, as the next one
    client_token: float = 0.0

    @property
    def serving_takes_time(self) -> bool:
        return any(getattr(self, name) for name in self.__slots__ if name.startswith("server_"))

    def server_request_s(self, demand: Demand, num_instances: int) -> float:
        seconds = self.server_request + demand.prompt_tokens * self.server_prompt_token
        seconds += len(demand.media) * self.server_item
        seconds += sum(item.nbytes for item in demand.media) * self.server_media_byte
        return seconds + num_instances * self.server_peer

    def encode_s(self, works: list[EncodeWork], read: Sequence[Item]) -> float:
        """`read`: items that are read for this step; those that were read for an earlier one are still there."""
        rows = sum(work.unit.num_tokens for work in works)
        seconds = self.encode_step + len(works) * self.encode_unit + rows * self.encode_row
        if self.encode_pair:
            seconds += sum(work.unit.num_tokens**2 for work in works) * self.encode_pair
        return seconds + len(read) * self.encode_item + self.pixels_s(read)

    def pixels_s(self, read: Sequence[Item]) -> float:
        """Of it, what hangs on the size of sources."""
        return sum(item.pixels for item in read) * self.encode_pixel

    def language_s(self, decodes: list[Chunk], chunks: list[Chunk]) -> float:
        """A forward over chunks of prompts and the decodes that ride along: the larger of the fixed parts, and the sum
        of the others."""
        seconds = max(self.decode_step if decodes else 0.0, self.prefill_step) + self.sequences_s(decodes)
        for chunk in chunks:
            pairs = chunk.length * (chunk.start + 0.5 * chunk.length)
            seconds += self.prefill_sequence + chunk.length * self.prefill_token + pairs * self.prefill_pair
        return seconds

    def sequences_s(self, decodes: list[Chunk]) -> float:
        """What decodes add to a step that prefills: its products have many rows anyway."""
        return len(decodes) * self.decode_sequence + sum(chunk.start for chunk in decodes) * self.decode_context

    def decode_s(self, num_sequences: int, context: int) -> float:
        """A step that only decodes, over sequences of `context` tokens together before it."""
        return self.decode_fixed_s(num_sequences) + context * self.decode_context

    def decode_growth_s(self, num_sequences: int) -> float:
        """More of a decode step than of the one before it: every sequence looks at one token more."""
        return num_sequences * self.decode_context

    def decode_fixed_s(self, num_sequences: float) -> float:
        """What a decode step takes beside its context."""
        few = min(num_sequences, FEW)
        return self.decode_step + num_sequences * self.decode_sequence + few * self.decode_few

    def crowding(self, stage: Stage) -> float:
        """Of a step of that stage; one that prefills as well is prefill's."""
        return {
            Stage.ENCODE: self.encode_crowding,
            Stage.PREFILL: self.prefill_crowding,
            Stage.DECODE: self.decode_crowding,
        }[stage]

    def pull_s(self, region: str, num_tokens: int) -> float:
        token_bytes = self.kv_token_bytes if region == "kv" else self.embedding_row_bytes
        return self.transfer + num_tokens * token_bytes / self.bytes_per_second

    def offload_s(self, num_tokens: int) -> float:
        return num_tokens * self.kv_token_bytes / self.host_bytes_per_second

    def switch_s(self, before: Role, after: Role) -> float:
        """Without the drain. Halves that the new role does not need are dropped, which takes no time."""
        return self.switch_weights if before.num_halves_to_load(after) else self.switch_books
