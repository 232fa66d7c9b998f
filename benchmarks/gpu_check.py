"""Correctness and speed of the model runtime on one device, without a server: tiny models first, then stages by size.

python benchmarks/gpu_check.py                       CUDA: answers of every family against the CPU's, then every stage
python benchmarks/gpu_check.py --device cpu --size tiny

Writes benchmarks/results/gpu_check_<device>.json. Needs no network; weights are random.
"""

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

from tests.checkpoints import FAMILIES  # noqa: E402
from tests.model.builders import Pixels, checkpoint, make_request  # noqa: E402
from tests.model.halves import Halves  # noqa: E402
from triptych.config import EMBEDDING_BLOCK_TOKENS, KV_BLOCK_TOKENS, ModelConfig  # noqa: E402
from triptych.core import (  # noqa: E402
    Chunk,
    EncodeUnit,
    EncodeWork,
    RequestId,
    SamplingParams,
    Sequence,
    UnitHash,
)
from triptych.model.caches import EmbeddingRegion, KVRegion  # noqa: E402
from triptych.model.encoder import EncodeRunner  # noqa: E402
from triptych.model.language import LanguageRunner  # noqa: E402
from triptych.model.loading import Half, load_config, load_half, weight_bytes  # noqa: E402
from triptych.model.probe import embedding_layout, kv_layout  # noqa: E402

# hidden, layers, heads, kv heads, ffn, vocabulary | tower: width, layers, heads, ffn. The larger ones are Qwen2.5-VL's.
SIZES = {
    "tiny": (128, 4, 4, 2, 384, 8192, 128, 4, 4, 384),
    "small": (768, 12, 12, 4, 3072, 8192, 768, 12, 12, 2048),
    "3b": (2048, 36, 16, 2, 11008, 151936, 1280, 32, 16, 3420),
    "7b": (3584, 28, 28, 4, 18944, 152064, 1280, 32, 16, 3420),
}
PATCH = 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--sides", nargs="*", type=int, default=[448, 896])
    parser.add_argument("--prompts", nargs="*", type=int, default=[512, 2048])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # the comparison is made in float32
    report: dict[str, Any] = {"environment": environment(options.device)}
    report["answers"] = [check_family(family, options.device) for family in options.families]
    report["stages"] = measure_stages(options)
    path = options.json or ROOT / "benchmarks" / "results" / f"gpu_check_{options.device.split(':')[0]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")
    if not all(answer["equal"] or "skipped" in answer for answer in report["answers"]):
        sys.exit(1)


def environment(device: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    triton = __import__("triton").__version__ if importlib.util.find_spec("triton") else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": triton,
    }


def check_family(family: str, device: str) -> dict[str, Any]:
    """Whether the halves of a tiny model on the device give what `generate` gives on CPU, in float32."""
    try:
        requests = [make_request(family, index) for index in range(5)]
    except (ImportError, ValueError) as error:  # some versions of transformers want torchvision for some processors
        print(f"{family:12s} skipped: {error}", flush=True)
        return {"family": family, "equal": None, "skipped": str(error)}
    answers = Halves(checkpoint(family), device).answer(requests, output_tokens=10)
    equal = [a[: len(r.expected)] == r.expected for a, r in zip(answers, requests, strict=True)]
    print(f"{family:12s} {sum(equal)} of {len(equal)} answers equal", flush=True)
    return {"family": family, "equal": all(equal), "answers": equal}


def measure_stages(options: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), options.size)
        config = ModelConfig(
            path=folder, name=options.size, dtype=options.dtype, device=options.device, load_format="dummy"
        )
        hf_config = load_config(folder)
        halves = {half: load_half(config, half) for half in Half}
        dtype = getattr(torch, options.dtype)
        kv, rows = kv_layout(hf_config, dtype), embedding_layout(hf_config, dtype)
        tokens = max(options.batches) * (max(options.prompts) + 64) + 1024
        region = KVRegion.allocate(kv, -(-tokens // KV_BLOCK_TOKENS), options.device)
        embeddings = EmbeddingRegion.allocate(rows, 2048, options.device)
        pixels, family = Pixels(), SimpleNamespace(image_groups=False)
        encoder = EncodeRunner(halves[Half.ENCODE], pixels, embeddings)
        language = LanguageRunner(halves[Half.LANGUAGE], family, region, embeddings, ())
        weights = sum(map(weight_bytes, halves.values()))
        print(f"{options.size}: {weights / 1e9:.2f} GB of weights, KV {kv.block_bytes} bytes a block")
        bench = Bench(options.device, options.repeats)
        measure_encode(bench, encoder, pixels, options.sides)
        measure_prefill(bench, language, options.prompts)
        measure_decode(bench, language, options.batches, options.prompts)
        measure_copies(bench, language, region)
        return bench.results


class Bench:
    """Times a function with the device synchronised before and after."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = torch.device(device), repeats
        self.results: list[dict[str, Any]] = []

    def time(self, stage: str, function: Callable[[], object], **facts: Any) -> None:
        for _ in range(2):
            function()
        samples = []
        for _ in range(self.repeats):
            self._synchronise()
            start = time.perf_counter()
            function()
            self._synchronise()
            samples.append((time.perf_counter() - start) * 1e3)
        best, middle = min(samples), median(samples)
        result = {"stage": stage, **facts, "min_ms": round(best, 3), "median_ms": round(middle, 3)}
        if "bytes" in facts:
            result["gb_per_s"] = round(facts["bytes"] / best / 1e6, 2)
        self.results.append(result)
        print("  ".join(f"{name}={value}" for name, value in result.items()), flush=True)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_encode(bench: Bench, encoder: EncodeRunner, pixels: Pixels, sides: list[int]) -> None:
    for side in sides:
        grid = side // PATCH // 2 * 2
        num_tokens = grid * grid // 4
        pixels.tensors[b"x"] = {
            "pixel_values": torch.randn(grid * grid, 3 * 2 * PATCH * PATCH),
            "image_grid_thw": torch.tensor([[1, grid, grid]]),
        }
        unit = EncodeUnit(UnitHash(bytes(16)), "image", num_tokens, (1, grid, grid))
        blocks = -(-num_tokens // EMBEDDING_BLOCK_TOKENS)
        for count in (1, 4) if bench.device.type == "cuda" else (1,):
            works = [EncodeWork(unit, b"x", list(range(i * blocks, (i + 1) * blocks))) for i in range(count)]
            bench.time("encode", lambda works=works: encoder.run(works), side=side, pictures=count, rows=num_tokens)


def measure_prefill(bench: Bench, language: LanguageRunner, prompts: list[int]) -> None:
    for length in prompts:
        sequence = make_sequence(length, list(range(-(-length // KV_BLOCK_TOKENS))))
        bench.time("prefill", lambda s=sequence, n=length: language.run([Chunk(s, 0, n)]), tokens=length)
        half = length // 2
        bench.time("prefill_chunk", lambda s=sequence, h=half: language.run([Chunk(s, h, h)]), tokens=half, after=half)


def measure_decode(bench: Bench, language: LanguageRunner, batches: list[int], contexts: list[int]) -> None:
    for context in contexts:
        blocks = -(-(context + 1) // KV_BLOCK_TOKENS)
        for batch in batches:
            sequences = [make_sequence(context, list(range(i * blocks, (i + 1) * blocks))) for i in range(batch)]
            chunks = [Chunk(sequence, context - 1, 1) for sequence in sequences]
            bench.time("decode", lambda c=chunks: language.run(c), batch=batch, context=context)


def measure_copies(bench: Bench, language: LanguageRunner, region: KVRegion) -> None:
    blocks = list(range(0, min(region.num_blocks, 256), 2))
    size = len(blocks) * region.layout.block_bytes
    saved = language.offload(blocks)
    bench.time("offload", lambda: language.offload(blocks), blocks=len(blocks), bytes=size)
    bench.time("restore", lambda: language.restore(saved, blocks), blocks=len(blocks), bytes=size)
    index = torch.tensor(blocks, device=bench.device)
    bench.time("copy_blocks", lambda: region.blocks.index_select(0, index), blocks=len(blocks), bytes=size)


def make_sequence(length: int, blocks: list[int]) -> Sequence:
    sampling = SamplingParams(max_tokens=1 << 20, seed=0, temperature=0.0)
    return Sequence(RequestId("r"), [5] * length, length, sampling, block_table=blocks)


def write_config(folder: Path, size: str) -> None:
    """A Qwen2.5-VL of that size."""
    hidden, layers, heads, kv_heads, ffn, vocab, width, depth, tower_heads, tower_ffn = SIZES[size]
    pairs = hidden // heads // 2
    section = [pairs // 4, (pairs - pairs // 4) // 2, pairs - pairs // 4 - (pairs - pairs // 4) // 2]
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": ffn,
            "vocab_size": vocab,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
        },
        vision_config={
            "depth": depth,
            "hidden_size": width,
            "num_heads": tower_heads,
            "intermediate_size": tower_ffn,
            "out_hidden_size": hidden,
            "patch_size": PATCH,
            "fullatt_block_indexes": [depth // 4 * i + depth // 4 - 1 for i in range(4)],
        },
        image_token_id=10,
        video_token_id=11,
        vision_start_token_id=12,
        vision_end_token_id=13,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(folder)


if __name__ == "__main__":
    main()
