"""The example of docs/families.md is a family that works as it stands there."""

import re
from pathlib import Path

import pytest
import transformers
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil

from tests.model import test_families, test_units
from tests.recipes import RECIPES
from tests.recipes.base import Recipe, Text, TokenId
from triptych.model import families

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_example_is_proved_by_the_tests_that_the_page_names(monkeypatch: pytest.MonkeyPatch) -> None:
    family, recipe = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    written: dict[str, type[families.Family]] = {}
    exec(family, written)
    recipes: dict[str, Recipe] = {}
    names = (transformers, PreTrainedConfig, BaseImageProcessor, DeepseekVLImageProcessorPil, Recipe, Text)
    exec(recipe, {name.__name__: name for name in names} | {"TokenId": TokenId, "RECIPES": recipes})
    monkeypatch.setitem(families._FAMILIES, "deepseek_vl", written["DeepseekVL"])
    monkeypatch.setitem(RECIPES, "deepseek_vl", recipes["deepseek_vl"])
    test_families.test_replacement_text_from_the_size_is_what_the_processor_writes("deepseek_vl", {})
    test_units.test_units_encoded_alone_or_in_any_batch_are_the_embeddings_of_the_unsplit_model("deepseek_vl")
