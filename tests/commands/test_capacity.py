"""`triptych capacity`, as it is called."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.checkpoints import make_checkpoint
from triptych.commands.capacity import capacity
from triptych.core import Role
from triptych.demo import checkpoint_path
from triptych.errors import ConfigError

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(capacity)


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    if result.exception is not None:
        raise result.exception
    return result.output


def test_table_says_what_limits_each_cell_and_compares_in_its_last_line() -> None:
    output = call("minicpm-v-2.6", "--images-per-request", "10", "--as-paper")
    assert "a picture of 4032x3024 is 10 units, 660 tokens" in output
    assert "49 (context)" in output and "7 (memory)" in output
    assert output.splitlines()[-1] == (
        "One request may have 49 pictures on e, p and d (then memory), and 7 on epd (memory): 7.0 times as many."
    )


def test_weights_that_do_not_fit_are_said_in_the_table() -> None:
    output = call("internvl2-26b", "--gpu", "L40S", "--image", "787x444")
    assert "weights do not fit" in output
    assert "only disaggregated does it fit." in output.splitlines()[-1]


def test_what_fits_nowhere_is_said_with_what_is_missing_and_what_to_do() -> None:
    output = call("internvl2-26b", "--gpu", "RTX-4090")
    assert output.count("GB short") == 6 and "-" not in output.splitlines()[3].partition("free")[2]
    assert "on epd (weights do not fit): neither fits; a larger --gpu is needed." in output


def test_sizes_of_a_small_model_have_small_units() -> None:
    output = call()
    assert output.startswith("triptych-demo: 3.2 million parameters, 1.3 million of them in the encoder; 6.14 MB of KV")
    assert "7.63 MB" in output


def test_that_the_built_in_model_is_tiny_is_said_and_what_else_to_name() -> None:
    for model in ([], [str(checkpoint_path())]):
        assert call(*model).splitlines()[-1] == (
            "triptych-demo is tiny, 3.2 million parameters: name a checkpoint or a preset, such as qwen2.5-vl-7b, for "
            "numbers of a usual model."
        )
    assert "tiny" not in call("qwen2.5-vl-7b")


def test_that_disaggregation_gains_nothing_is_said() -> None:
    output = call("internvl2-8b", "--max-num-batched-tokens", "2048", "--max-encode-tokens", "1024")
    assert output.splitlines()[-1].endswith("for memory alone, disaggregation gains nothing here.")


def test_json_has_every_role() -> None:
    found = json.loads(call("qwen3-vl-8b", "--image", "1280x960", "--images-per-request", "2", "--json"))
    assert set(found["roles"]) == {role.value for role in Role}
    assert found["model"]["parameters"] == 8_767_123_696
    assert found["request"]["rows_of_an_image"] == 40 * 30
    assert found["roles"]["e"]["kv_tokens"] is None
    for row in found["roles"].values():
        assert set(row["batch"]) == {"number", "limit"}
    assert found["images_per_request"]["disaggregated"]["number"] > 0


def test_model_is_a_checkpoint_or_its_config_and_the_device_a_file(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen2_5_vl", tmp_path / "tiny")
    hardware = tmp_path / "gpu.json"
    device = {"flops": "1 TFLOP/s", "memory_bandwidth": "10 GB/s", "memory": "8 MB", "link": "1 GB/s"}
    hardware.write_text(json.dumps({"devices": {"toy": device | {"host_link": "1 GB/s"}}}))
    for model in (folder, folder / "config.json"):
        found = json.loads(call(str(model), "--gpu", str(hardware), "--image", "64x64", "--json"))
        assert found["gpu"] == {"name": "toy", "memory_bytes": 8_000_000}
        assert found["model"]["context"] == 4096
        assert found["model"]["name"] == "tiny"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpt-9"], "model 'gpt-9': neither a folder, nor a config file, nor one of minicpm-v-2.6"),
        (["internvl2-8b", "--gpu", "B300"], "--gpu: 'B300' is neither a hardware file nor one of A100-40G"),
        (["internvl2-8b", "--image", "4k"], "--image: '4k' is no size in pixels; use WIDTHxHEIGHT"),
        (["internvl2-8b", "--image", "0x10"], "--image: '0x10' is no size in pixels"),
        (["internvl2-8b", "--image", "100000x3"], "--image: '100000x3' is no size in pixels; use WIDTHxHEIGHT"),
        (["qwen2.5-vl-7b", "--image", "1x99999"], "1x99999: one side is more than 200 times the other"),
        (["internvl2-8b", "--max-num-batched-tokens", "0"], "--max-num-batched-tokens: 0 is not valid; a number"),
        (["internvl2-8b", "--max-encode-tokens", "0"], "--max-encode-tokens: 0 is not valid; a number from 1 to"),
        (["internvl2-8b", "--embedding-cache", "0 GB"], "--embedding-cache: 0 B is not valid; above 0 B is needed"),
        (["internvl2-8b", "--as-paper", "--utilization", "0.5"], "--utilization: is that of the paper with --as-paper"),
        (["internvl2-8b", "--as-paper", "--embedding-cache", "1 GB"], "--embedding-cache: is that of the paper with"),
        (["internvl2-8b", "--as-paper", "--max-encode-tokens", "9"], "--max-encode-tokens: is that of the paper with"),
        ([""], "model '': neither a folder, nor a config file, nor one of"),
        (["internvl2-8b", "--kv-fraction", "1.5"], "--kv-fraction: 1.5 is not valid; a number above 0 and below 1"),
        (["internvl2-8b", "--images-per-request", "0"], "--images-per-request: 0 is not valid; a number from 1 to"),
        (["internvl2-8b", "--embedding-cache", "2"], "--embedding-cache: '2' has no unit"),
    ],
)
def test_bad_input_is_refused_with_what_is_valid(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        call(*arguments)
    assert words in str(refused.value)
