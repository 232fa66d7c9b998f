"""Tiny checkpoints and what planning reads from their configs."""

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import transformers

from tests.checkpoints import make_checkpoint
from triptych.model.families import Modality, Parts, family_for
from triptych.model.loading import load_config
from triptych.planning.model.shapes import ModelShape, find_shape


@cache
def checkpoint(family: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="shapes-"))
    return make_checkpoint(family, folder / family)


@cache
def modalities(family: str) -> Mapping[str, Modality]:
    folder = checkpoint(family)
    parts = Parts(folder, transformers.AutoTokenizer.from_pretrained(folder))
    return {modality.name: modality for modality in family_for(load_config(folder)).modalities(parts)}


@cache
def shape(family: str) -> ModelShape:
    return find_shape(str(checkpoint(family)))
