"""The same placement for other engines: launch commands as a shell script, comments where there is no equivalent.

Flags of vLLM: its pages "Disaggregated Encoder" (v0.32) and "NixlConnector Usage Guide", with the proxies of its
examples and tests; of SGLang: its pages "EPD Disaggregation" and "PD Disaggregation".
"""

import json
import shlex
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from triptych.core import Role, Stage
from triptych.errors import ConfigError
from triptych.planning.search.space import Candidate

Engine = Literal["vllm", "sglang"]

FIRST_PORT = 8100  # of the instances
PORT = 8000  # of what clients talk to
FIRST_SIDE_PORT = 5600  # of NIXL's handshakes, vLLM's default, one for each GPU
MANY_TOKENS = 114_688  # vLLM's example: a budget of tokens means nothing to an encoder, and must not bind
SHAPES = ({Role.EPD}, {Role.E, Role.PD}, {Role.E, Role.P, Role.D}, {Role.EP, Role.D})


class Instance(msgspec.Struct, frozen=True):
    """Where one of them runs."""

    role: Role
    port: int
    gpus: tuple[int, ...]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> str:
        return f"CUDA_VISIBLE_DEVICES={','.join(map(str, self.gpus))}"


def can_export(candidate: Candidate) -> bool:
    """Whether their proxies route this shape."""
    return set(candidate.family) in SHAPES


def export(engine: Engine, candidate: Candidate, model: str, note: str | None = None) -> str:
    """A script that starts all instances on one host and, when they are up, the proxy. `note` says why it is not of the
    best candidate. Raises ConfigError where they cannot route it."""
    if not can_export(candidate):
        known = ", ".join("+".join(sorted(shape)) for shape in SHAPES)
        raise ConfigError(f"--export: {engine} has no equivalent of {candidate}; it routes {known}")
    script: Callable[[Candidate, list[Instance]], list[str]] = {"vllm": _vllm, "sglang": _sglang}[engine]
    head = [
        "#!/usr/bin/env bash",
        f"# {candidate}, as `triptych plan` found it, on {engine} on one host.",
        *([f"# {note}"] if note else []),
        *(f"# No equivalent: {text}" for text in missing(candidate)),
        "set -euo pipefail",
        f"MODEL={shlex.quote(model)}",
        "pids=()",
        """trap 'kill "${pids[@]}" 2> /dev/null || true' EXIT  # nothing but what is started here""",
    ]
    return "\n".join([*head, "", *script(candidate, _instances(candidate)), 'wait "${pids[@]}"', ""])


def missing(candidate: Candidate) -> list[str]:
    """What the plan counts on and the engines do not have."""
    found = []
    splits, several = Role.E in candidate.family, candidate.placement.roles.count(Role.E) > 1
    if candidate.streamed_prefill and splits:
        found.append("prefill that starts before all media of a prompt are encoded; expect later first tokens.")
    if several and not candidate.parallel_encode:
        found.append("the media of one request on one encoder; they are spread over all encoders.")
    elif several:
        found.append("tiles of one picture on several encoders; only whole items are spread.")
    if splits:
        found.append(f"at most {candidate.max_encode_tokens} embedding rows in one encode step.")
    if candidate.schedule != "fcfs":
        found.append(f"the order {candidate.schedule} of waiting requests; they are served first come, first served.")
    return found


def _instances(candidate: Candidate) -> list[Instance]:
    found, gpu = [], 0
    for number, role in enumerate(candidate.placement.roles):
        size = candidate.degree(role)
        found.append(Instance(role, FIRST_PORT + number, tuple(range(gpu, gpu + size))))
        gpu += size
    return found


# ---- vLLM


def _vllm(candidate: Candidate, instances: list[Instance]) -> list[str]:
    if candidate.is_aggregated:
        gpus = tuple(gpu for instance in instances for gpu in instance.gpus)
        alone = Instance(Role.EPD, PORT, gpus)
        return [_vllm_serve(candidate, alone, [f"--data-parallel-size {len(instances)}"])]
    lines = ["STORE=$(mktemp -d)  # of embeddings on their way"] if Role.E in candidate.family else []
    lines += [_vllm_serve(candidate, instance, _vllm_transfers(instance)) for instance in instances]
    where = "# The proxy is no part of the package of vLLM: run this script in a clone of its repository."
    return [*lines, _until_up(instances), where, _vllm_proxy(candidate, instances)]


def _vllm_serve(candidate: Candidate, instance: Instance, flags: list[str]) -> str:
    encodes_only = instance.role is Role.E
    tokens = MANY_TOKENS if encodes_only else candidate.max_num_batched_tokens
    common = [
        f"--port {instance.port}",
        f"--tensor-parallel-size {candidate.degree(instance.role)}",
        f"--max-num-seqs {candidate.max_num_seqs}",
        f"--max-num-batched-tokens {tokens}",
    ]
    if encodes_only:
        common += ["--enforce-eager", "--no-enable-prefix-caching", "--mm-encoder-only"]
    if instance.role is not Role.EPD:
        common.append("--enable-request-id-headers")
    variables = [instance.environment]
    if instance.role in (Role.P, Role.D, Role.EP):
        variables.append(f"VLLM_NIXL_SIDE_CHANNEL_PORT={FIRST_SIDE_PORT + instance.gpus[0]}")
    return _command([*variables, 'vllm serve "$MODEL"'], [*common, *flags])


def _vllm_transfers(instance: Instance) -> list[str]:
    flags = []
    stages = instance.role.stages
    if instance.role in (Role.E, Role.P, Role.PD):
        role = "ec_producer" if instance.role is Role.E else "ec_consumer"
        store = {"shared_storage_path": "STORE"}
        config = {"ec_connector": "ECExampleConnector", "ec_role": role, "ec_connector_extra_config": store}
        flags.append("--ec-transfer-config " + _json(config).replace('"STORE"', '"\'"$STORE"\'"'))
    if (Stage.PREFILL in stages) != (Stage.DECODE in stages):
        role = "kv_producer" if Stage.PREFILL in stages else "kv_consumer"
        flags.append("--kv-transfer-config " + _json({"kv_connector": "NixlConnector", "kv_role": role}))
    return flags


def _vllm_proxy(candidate: Candidate, instances: list[Instance]) -> str:
    by_role = {role: [one for one in instances if one.role is role] for role in candidate.family}
    if Role.EP in by_role:
        flags = [f"--port {PORT}"]
        for name, role in (("prefiller", Role.EP), ("decoder", Role.D)):
            flags.append(f"--{name}-hosts {' '.join('127.0.0.1' for _ in by_role[role])}")
            flags.append(f"--{name}-ports {' '.join(str(one.port) for one in by_role[role])}")
        script = "python tests/v1/kv_connector/nixl_integration/toy_proxy_server.py"  # of vLLM's repository
        return _command([script], flags)
    urls = {role: ",".join(one.url for one in found) for role, found in by_role.items()}
    flags = [
        f"--port {PORT}",
        f"--encode-servers-urls {urls[Role.E]}",
        f"--prefill-servers-urls {urls.get(Role.P, 'disable')}",
        f"--decode-servers-urls {urls.get(Role.D) or urls[Role.PD]}",
    ]
    return _command(["python examples/disaggregated/disaggregated_encoder/disagg_epd_proxy.py"], flags)


# ---- SGLang


def _sglang(candidate: Candidate, instances: list[Instance]) -> list[str]:
    if candidate.is_aggregated:
        gpus = tuple(gpu for instance in instances for gpu in instance.gpus)
        return [_sglang_launch(candidate, Instance(Role.EPD, PORT, gpus), [f"--dp-size {len(instances)}"])]
    encoders = " ".join(one.url for one in instances if one.role is Role.E)
    lines = [_sglang_launch(candidate, one, _sglang_role(one.role, encoders)) for one in instances]
    return [*lines, _until_up(instances), _sglang_router(instances)]


def _sglang_launch(candidate: Candidate, instance: Instance, flags: list[str]) -> str:
    common = [
        '--model-path "$MODEL"',
        f"--port {instance.port}",
        f"--tp-size {candidate.degree(instance.role)}",
    ]
    if instance.role is not Role.E:
        common.append(f"--max-running-requests {candidate.max_num_seqs}")
        common.append(f"--chunked-prefill-size {candidate.max_num_batched_tokens}")
    return _command([instance.environment, "python -m sglang.launch_server"], [*common, *flags])


def _sglang_role(role: Role, encoders: str) -> list[str]:
    language = ["--language-only", f"--encoder-urls {encoders}", "--encoder-transfer-backend zmq_to_scheduler"]
    flags = {
        Role.E: ["--encoder-only", "--encoder-transfer-backend zmq_to_scheduler"],
        Role.P: ["--disaggregation-mode prefill", *language],
        Role.PD: language,
        Role.EP: ["--disaggregation-mode prefill"],
        Role.D: ["--disaggregation-mode decode"],
    }
    return flags[role]


def _sglang_router(instances: list[Instance]) -> str:
    head = "python -m sglang_router.launch_router"
    whole = [one.url for one in instances if one.role is Role.PD]
    if whole:
        return _command([head], [f"--port {PORT}", f"--worker-urls {' '.join(whole)}"])
    prefill = [f"--prefill {one.url}" for one in instances if one.role in (Role.P, Role.EP)]
    decode = [f"--decode {one.url}" for one in instances if one.role is Role.D]
    return _command([head], ["--pd-disaggregation", *prefill, *decode, f"--port {PORT}"])


def _until_up(instances: list[Instance]) -> str:
    """Ends the script where one of them has ended."""
    ports = " ".join(str(one.port) for one in instances)
    return f"""for port in {ports}; do  # until all are up
    until curl -sf "http://127.0.0.1:$port/health" > /dev/null; do
        for pid in "${{pids[@]}}"; do kill -0 "$pid" || exit 1; done  # says which has ended
        sleep 2
    done
done
"""


def _command(head: list[str], flags: list[str]) -> str:
    return " \\\n    ".join([" ".join(head), *flags]) + " &\npids+=($!)\n"


def _json(value: dict[str, Any]) -> str:
    return f"'{json.dumps(value)}'"
