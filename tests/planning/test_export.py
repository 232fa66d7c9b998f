"""Launch scripts for vLLM and SGLang: every instance on GPUs of its own, with the flags of its role, and a proxy."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from triptych.core import Placement
from triptych.errors import ConfigError
from triptych.planning.search.export import can_export, export
from triptych.planning.search.space import Candidate

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"


def make(placement: str, **options: object) -> Candidate:
    return Candidate(placement=Placement.parse(placement), **options)


def commands(script: str) -> list[list[str]]:
    """The words of every command that the script starts."""
    joined = script.replace("\\\n", " ")
    return [shlex.split(line)[:-1] for line in joined.splitlines() if line.endswith("&")]


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("placement", ["2epd", "2e1pd", "1e1p1d", "3e2p1d", "2ep1d"])
def test_the_scripts_are_shell(engine: str, placement: str):
    script = export(engine, make(placement, degrees=(1, 1, 1)), "a model's folder")
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False).returncode == 0
    assert "MODEL='a model'\"'\"'s folder'" in script


def test_vllm_gets_producers_and_consumers_on_gpus_of_their_own():
    *instances, proxy = commands(export("vllm", make("2e1p1d", degrees=(1, 2, 2), max_num_seqs=32), MODEL))
    assert [words[0] for words in instances] == [f"CUDA_VISIBLE_DEVICES={gpus}" for gpus in ("0", "1", "2,3", "4,5")]
    configs = [json.loads(after(words, "--ec-transfer-config")) for words in instances[:3]]
    assert [config["ec_role"] for config in configs] == ["ec_producer", "ec_producer", "ec_consumer"]
    assert configs[0]["ec_connector_extra_config"] == {"shared_storage_path": "$STORE"}
    assert "--mm-encoder-only" in instances[0] and "--mm-encoder-only" not in instances[2]
    assert [json.loads(after(words, "--kv-transfer-config"))["kv_role"] for words in instances[2:]] == [
        "kv_producer",
        "kv_consumer",
    ]
    assert [after(words, "--tensor-parallel-size") for words in instances] == ["1", "1", "2", "2"]
    assert after(instances[3], "--max-num-seqs") == "32"
    assert after(proxy, "--encode-servers-urls") == "http://127.0.0.1:8100,http://127.0.0.1:8101"
    assert after(proxy, "--prefill-servers-urls") == "http://127.0.0.1:8102"
    assert after(proxy, "--decode-servers-urls") == "http://127.0.0.1:8103"


def test_vllm_without_a_prefill_stage_says_so():
    *_, proxy = commands(export("vllm", make("1e2pd"), MODEL))
    assert after(proxy, "--prefill-servers-urls") == "disable"
    assert after(proxy, "--decode-servers-urls") == "http://127.0.0.1:8101,http://127.0.0.1:8102"


def test_vllm_splits_prefill_from_decode_without_encoders():
    ep, _, d, proxy = commands(export("vllm", make("2ep1d"), MODEL))
    assert "--ec-transfer-config" not in ep
    assert json.loads(after(d, "--kv-transfer-config"))["kv_role"] == "kv_consumer"
    assert proxy[proxy.index("--prefiller-ports") + 1 : proxy.index("--decoder-hosts")] == ["8100", "8101"]


def test_aggregated_instances_are_data_parallel():
    (vllm,), (sglang,) = (commands(export(engine, make("4epd", degrees=(2, 2, 2)), MODEL)) for engine in ENGINES)
    assert vllm[0] == sglang[0] == "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7"
    assert (after(vllm, "--data-parallel-size"), after(vllm, "--tensor-parallel-size")) == ("4", "2")
    assert (after(sglang, "--dp-size"), after(sglang, "--tp-size")) == ("4", "2")


def test_sglang_gets_encoders_language_models_and_a_router():
    e0, _, p, d, router = commands(export("sglang", make("2e1p1d", max_num_batched_tokens=4096), MODEL))
    assert "--encoder-only" in e0 and "--language-only" in p and "--language-only" not in d
    assert p[p.index("--encoder-urls") + 1 :][:2] == ["http://127.0.0.1:8100", "http://127.0.0.1:8101"]
    assert (after(p, "--disaggregation-mode"), after(d, "--disaggregation-mode")) == ("prefill", "decode")
    assert after(p, "--chunked-prefill-size") == "4096"
    assert (after(router, "--prefill"), after(router, "--decode")) == ("http://127.0.0.1:8102", "http://127.0.0.1:8103")


def test_what_has_no_equivalent_stands_in_comments():
    script = export("vllm", make("2e1p1d", schedule="slo"), MODEL)
    said = re.findall(r"^# No equivalent: (.*)", script, re.M)
    assert any("prefill that starts before" in text for text in said)
    assert any("the order slo" in text for text in said)
    assert not any("one encoder;" in text for text in said)
    assert any("on one encoder;" in text for text in _said(make("2e1p1d", parallel_encode=False)))


def test_nothing_is_said_to_be_missing_that_the_placement_does_not_use():
    assert _said(make("2epd")) == _said(make("2ep1d")) == []
    for parallel in (True, False):
        (rows,) = _said(make("1e1pd", streamed_prefill=False, parallel_encode=parallel))
        assert "embedding rows" in rows


def _said(candidate: Candidate) -> list[str]:
    return re.findall(r"^# No equivalent: (.*)", export("sglang", candidate, MODEL), re.M)


@pytest.mark.parametrize("placement", ["1e1pd1epd", "1ed1p", "1ep1pd"])
def test_a_shape_that_no_proxy_routes_is_refused(placement: str):
    assert not can_export(make(placement))
    with pytest.raises(ConfigError, match=f"--export: vllm has no equivalent of {placement}"):
        export("vllm", make(placement), MODEL)


@pytest.mark.parametrize(("curl", "starts"), [("exit 0", True), ("exit 1", False)])
def test_the_proxy_starts_when_all_instances_are_up_and_never_if_one_ends(tmp_path: Path, curl: str, starts: bool):
    serves = "sleep 3" if starts else "exit 1"
    for name, does in {
        "vllm": serves,
        "curl": curl,
        "python": f"touch {tmp_path}/proxy",
        "sleep": "/bin/sleep 0.1",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = export("vllm", make("1e1pd"), MODEL)
    subprocess.run(["bash", "-c", script], env=environment, start_new_session=True, timeout=20, check=False)
    assert (tmp_path / "proxy").exists() == starts


@pytest.mark.parametrize("call", ["bash", "."])
def test_the_script_ends_what_it_started_and_nothing_else(tmp_path: Path, call: str):
    """Its caller goes on, though they are one process group."""
    serve = tmp_path / "vllm"
    serve.write_text(f"#!/bin/sh\ntrap 'kill $!; touch {tmp_path}/ended; exit' TERM\nsleep 60 & wait\n")
    serve.chmod(0o755)
    (tmp_path / "plan.sh").write_text(export("vllm", make("1epd"), MODEL).replace('wait "${pids[@]}"', "sleep 0.5"))
    until_ended = f"for _ in {{1..50}}; do [ -e {tmp_path}/ended ] && break; sleep 0.1; done"
    caller = f"sleep 60 & ({call} {tmp_path}/plan.sh); {until_ended}; touch {tmp_path}/after; kill $!"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", caller], env=environment, start_new_session=True, timeout=20, check=False)
    assert done.returncode == 0
    assert (tmp_path / "ended").exists() and (tmp_path / "after").exists()


def test_why_it_is_another_placement_stands_at_the_top():
    head = export("vllm", make("2epd"), MODEL, "vllm has no equivalent of 1ed1p: written is 2epd.").splitlines()[:3]
    assert head[2] == "# vllm has no equivalent of 1ed1p: written is 2epd."


ENGINES = ("vllm", "sglang")
