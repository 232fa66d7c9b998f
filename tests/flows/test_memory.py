"""An instance holds the weights of its role and no others: read from the process's own figures."""

import json
from pathlib import Path

import psutil
import pytest
import torch
import transformers

from tests.checkpoints import make_checkpoint
from tests.flows.servers import cluster, running

LANGUAGE = {"num_hidden_layers": 18, "hidden_size": 1024, "intermediate_size": 2048}
VISION = {"depth": 4, "embed_dim": 512, "num_heads": 8, "hidden_size": 1024}


@pytest.fixture
def lopsided(tmp_path: Path) -> Path:
    """A checkpoint whose language model is 90% of its bytes."""
    folder = make_checkpoint("qwen2_vl", tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= LANGUAGE
    config["text_config"]["rope_parameters"]["mrope_section"] = [32, 48, 48]
    config["text_config"].pop("layer_types", None)
    config["vision_config"] |= VISION
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = transformers.Qwen2VLForConditionalGeneration(transformers.AutoConfig.from_pretrained(folder))
    model.to_empty(device="cpu").save_pretrained(folder)
    return folder


def test_an_encode_instance_never_holds_the_language_model(lopsided: Path) -> None:
    weights = sum(file.stat().st_size for file in lopsided.glob("*.safetensors"))
    with running(lopsided, "1e1pd", max_model_len=256) as url:
        resident = {i["role"]: psutil.Process(i["pid"]).memory_full_info().uss for i in cluster(url)["instances"]}
    assert resident["e"] < 0.25 * weights, f"encode holds {resident['e']} bytes of {weights}"
    assert resident["pd"] > 0.85 * weights, "the language model was not loaded, so the comparison means nothing"
