"""Tiny random checkpoints of every supported family, in the format of the hub, for tests.

A folder has everything that a real one has: config, safetensors, generation config, tokenizer, image processor, chat
template. Weights are spread so that the greedy choice varies from step to step and hangs on the pictures; sizes are so
small that pictures become few tokens, yet pictures of different sizes become different numbers of them.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from tests.recipes import RECIPES
from tests.recipes.base import Recipe, Text

FAMILIES = tuple(RECIPES)
IMAGE_FAMILIES = tuple(family for family, recipe in RECIPES.items() if recipe.image_processor is not None)

disable_progress_bar()

CORPUS = [
    "What colour is the circle in picture 2? The circle is red, the square is blue, the star is green.",
    "How many triangles are there in the first picture? There are three triangles, and two of them are yellow.",
    "You are a helpful assistant. Describe the pictures above, one after the other, in a few words.\n\nPlease.",
    "Grüße aus Zürich! 今天天气很好。Сколько фигур на картинке? Voilà une réponse. 😀 🎉",
    "user assistant system model USER: ASSISTANT: User: Assistant: 0 1 2 3 4 5 6 7 8 9\n\n",
    "{'type': 'text'} <b>bold</b> x = f(y) + 1; # a comment\n    return None\n",
]


def make_checkpoint(family: str, folder: Path, *, seed: int = 0, text_layers: int = 3, hidden: int = 64) -> Path:
    """Writes a checkpoint of `family` (a key of RECIPES) into `folder` and returns it. Equal arguments, equal bytes."""
    recipe = RECIPES[family]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(recipe)
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = Text(text_layers, hidden, len(tokenizer), tokens)
    config = recipe.config(text, tokenizer.convert_tokens_to_ids)
    model = _random_model(recipe, config, seed)
    model.generation_config.update(**tokens)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _save_processors(recipe, folder)
    (folder / "chat_template.jinja").write_text(recipe.chat_template)
    (folder / "processor_config.json").write_text(json.dumps(recipe.processor))
    return folder


def _save_processors(recipe: Recipe, folder: Path) -> None:
    """Both share one file, where there are two."""
    file, together = folder / "preprocessor_config.json", {}
    for make in (recipe.image_processor, recipe.feature_extractor):
        if make is not None:
            make().save_pretrained(folder)
            together |= json.loads(file.read_text())
    if together:
        file.write_text(json.dumps(together))


def _random_model(recipe: Recipe, config: PreTrainedConfig, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, recipe.model_class)(config).to(torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # the default 0.02 gives the same token at every step
                    parameter.normal_(0, 0.12)
            model.get_input_embeddings().weight.mul_(recipe.embedding_scale)
    model.tie_weights()
    return model


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(_trained_bpe())
    special = ["<|endoftext|>", *([recipe.bos] if recipe.bos else []), recipe.eos, *recipe.special_tokens]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in dict.fromkeys(special)])
    if recipe.bos:
        bos = (recipe.bos, backend.token_to_id(recipe.bos))
        backend.post_processor = processors.TemplateProcessing(
            single=f"{recipe.bos} $A", pair=f"{recipe.bos} $A {recipe.bos} $B", special_tokens=[bos]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=recipe.bos,
        eos_token=recipe.eos,
        pad_token="<|endoftext|>",
        extra_special_tokens=recipe.named_tokens,
        clean_up_tokenization_spaces=False,
    )


@cache
def _trained_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return str(tokenizer.to_str())
