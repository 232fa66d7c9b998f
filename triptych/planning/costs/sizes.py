"""What a simulated instance has of everything that is bounded."""

from dataclasses import dataclass

from triptych.config import SchedulingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Pools and bounds of an instance. The names are those of the configuration."""

    num_kv_blocks: int = 20_000
    num_embedding_blocks: int = 4_000
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    max_encode_tokens: int = 1024
    streamed_prefill: bool = True
    chunked_kv_transfer: bool = True
    prefix_caching: bool = False
    decode_interval_ms: float = 0.0  # time per token to which answers slow down while a request waits for encoders
    heartbeat_s: float = 0.25

    @property
    def scheduling(self) -> SchedulingConfig:
        return SchedulingConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_encode_tokens=self.max_encode_tokens,
            streamed_prefill=self.streamed_prefill,
            chunked_kv_transfer=self.chunked_kv_transfer,
            decode_interval_ms=self.decode_interval_ms,
        )
