"""A pool of drawn pictures on disk, cut into patches just as the image processor does it.

Each shard has its own seed, so a pool is the same wherever it is made. Training reads it without decoding anything.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from triptych.demo.drawing import draw
from triptych.demo.facts import NUM_FACTS, Facts, fact_vector, random_facts

PATCH, MERGE = 14, 2
MIN_PIXELS, MAX_PIXELS = 84 * 84, 112 * 112
MAX_PATCHES = MAX_PIXELS // PATCH**2
PATCH_VALUES = 3 * PATCH * PATCH
SHARD_PICTURES = 5000

Grid = tuple[int, int]


@dataclass(slots=True)
class Pool:
    """Pictures as arrays; row i of each belongs to picture i."""

    patches: list[NDArray[np.uint8]]  # per shard [pictures, MAX_PATCHES, PATCH_VALUES], zeros after the last patch
    shard_pictures: int
    grids: NDArray[np.int16]  # [pictures, 2], in patches
    facts: list[Facts]
    vectors: NDArray[np.float32]  # [pictures, NUM_FACTS]

    def __len__(self) -> int:
        return len(self.facts)

    def gather(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        rows = (self.patches[i // self.shard_pictures][i % self.shard_pictures] for i in indices)
        return np.stack(list(rows))


def ensure_pool(
    folder: Path, num_shards: int, first_seed: int, processes: int, shard_pictures: int = SHARD_PICTURES
) -> Pool:
    """Draws the shards that are missing, then opens all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = [(folder / f"{first_seed + i}", first_seed + i, shard_pictures) for i in range(num_shards)]
    missing = [shard for shard in shards if not shard[0].with_suffix(".rows.npy").exists()]
    if processes > 1 and missing:
        with multiprocessing.get_context("spawn").Pool(processes) as workers:
            workers.starmap(_draw_shard, missing, chunksize=1)
    else:
        for shard in missing:
            _draw_shard(*shard)
    patches = [np.load(path.with_suffix(".patches.npy"), mmap_mode="r") for path, *_ in shards]
    rows = np.concatenate([np.load(path.with_suffix(".rows.npy")) for path, *_ in shards])
    facts = [Facts.from_row(row[2:]) for row in rows.tolist()]
    vectors = np.stack([fact_vector(f) for f in facts]) if facts else np.zeros((0, NUM_FACTS), np.float32)
    return Pool(patches, shard_pictures, rows[:, :2], facts, vectors)


def cut_patches(image: Image.Image) -> tuple[NDArray[np.uint8], Grid]:
    """-> [patches, PATCH_VALUES] in the processor's order (without its copy in time), and the grid."""
    height, width = smart_resize(image.height, image.width, PATCH * MERGE, MIN_PIXELS, MAX_PIXELS)
    pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    rows, columns = height // PATCH, width // PATCH
    blocks = pixels.transpose(2, 0, 1).reshape(3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    ordered = blocks.transpose(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, PATCH_VALUES)
    return ordered, (rows, columns)


def _draw_shard(path: Path, seed: int, num_pictures: int) -> None:
    rng = random.Random(seed)
    patches = np.zeros((num_pictures, MAX_PATCHES, PATCH_VALUES), np.uint8)
    rows = np.zeros((num_pictures, 8), np.int16)
    for i in range(num_pictures):
        facts = random_facts(rng)
        cut, grid = cut_patches(draw(facts, rng))
        patches[i, : len(cut)] = cut
        rows[i] = [*grid, *facts.to_row()]
    np.save(path.with_suffix(".patches.npy"), patches)
    np.save(path.with_suffix(".rows.npy"), rows)  # written last: its presence says that the shard is complete
