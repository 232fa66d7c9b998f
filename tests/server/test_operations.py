"""What operators read: health, metrics, the cluster, request ids, the description of the API."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.builders import make_peer
from tests.server.fakes import ANSWER, COUNTERS, D, E, FakeCluster, P, Stack, ids, processor, script
from tests.server.test_leaving import on_loop
from triptych.config import ServerConfig
from triptych.control.changes import Change
from triptych.control.events import Event
from triptych.control.instances import Instance, State, SwitchRecord
from triptych.core import InstanceId, Placement, Role
from triptych.errors import RequestError
from triptych.messages import Table
from triptych.planning.allocator import Decision
from triptych.server.app import create_app
from triptych.server.frontend import Frontend
from triptych.telemetry import Telemetry


@pytest.fixture
def stack() -> Iterator[Stack]:
    with Stack() as stack:
        yield stack


def metrics(stack: Stack) -> dict[str, float]:
    families = text_string_to_metric_families(stack.http.get("/metrics").text)
    return {
        sample.name
        + json.dumps({k: v for k, v in sample.labels.items() if k not in ("model_name", "le")}): sample.value
        for family in families
        for sample in family.samples
    }


def test_health_needs_an_instance_of_every_stage(stack: Stack) -> None:
    assert stack.http.get("/health").status_code == 200
    peers = [stack.frontend.table.peers[E], stack.frontend.table.peers[P]]
    on_loop(stack, lambda: stack.frontend.handle(Table(2, peers)))
    assert stack.http.get("/health").status_code == 503
    response = stack.chat()
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "server_error"
    pd = msgspec.structs.replace(peers[1], role=Role.PD)
    on_loop(stack, lambda: stack.frontend.handle(Table(3, [peers[0], pd])))
    assert stack.http.get("/health").status_code == 200


def test_an_older_table_is_ignored(stack: Stack) -> None:
    on_loop(stack, lambda: stack.frontend.handle(Table(1, [])))
    assert set(stack.frontend.table.peers) == {E, P, D}


def test_the_cluster_shows_instances_queues_and_pools(stack: Stack) -> None:
    cluster = stack.http.get("/cluster").json()
    assert cluster["placement"] == "1e1p1d"
    assert [instance["id"] for instance in cluster["instances"]] == ["e0", "p0", "d0"]
    prefill = cluster["instances"][1]
    assert prefill["role"] == "p"
    assert prefill["state"] == "active"
    assert prefill["queues"] == {"prefill_waiting": 1, "prefill_running": 2}
    assert prefill["pools"] == {"kv": {"total": 10, "free": 5, "used": 3, "cached": 2}}
    assert [instance["counters"] for instance in cluster["instances"]] == [COUNTERS[id] for id in (E, P, D)]


def test_metrics_have_the_names_of_vllm(stack: Stack) -> None:
    stack.chat()
    stack.chat(max_tokens=2)
    values = metrics(stack)
    num_tokens = len(ids(ANSWER)) + 1 + 2
    assert values["vllm:generation_tokens_total{}"] == num_tokens
    assert values["vllm:inter_token_latency_seconds_count{}"] == num_tokens - 2
    assert values["vllm:time_to_first_token_seconds_count{}"] == 2
    assert values["vllm:e2e_request_latency_seconds_count{}"] == 2
    assert values['vllm:request_success_total{"finished_reason": "stop"}'] == 1
    assert values['vllm:request_success_total{"finished_reason": "length"}'] == 1
    assert values["vllm:prompt_tokens_total{}"] > 0
    assert values["vllm:num_requests_running{}"] == 2
    assert values["vllm:num_requests_waiting{}"] == 1
    assert values["vllm:kv_cache_usage_perc{}"] == pytest.approx(0.3)
    assert values['triptych:pool_blocks{"instance": "p0", "pool": "kv", "role": "p", "state": "cached"}'] == 2


def test_metrics_tell_where_units_came_from_and_what_the_caches_did(stack: Stack) -> None:
    values = metrics(stack)
    units = {name: value for name, value in values.items() if "encode_units" in name}
    assert units == {
        'triptych:encode_units_total{"instance": "e0", "role": "e", "source": "computed"}': 7,
        'triptych:encode_units_total{"instance": "e0", "role": "e", "source": "cached"}': 2,
        'triptych:encode_units_total{"instance": "p0", "role": "p", "source": "transferred"}': 5,
        'triptych:encode_units_total{"instance": "p0", "role": "p", "source": "prefix"}': 3,
    }
    assert values['triptych:embedding_cache_hits_total{"instance": "e0", "role": "e"}'] == 2
    assert values['triptych:embedding_cache_evictions_total{"instance": "e0", "role": "e"}'] == 1
    assert values["vllm:prefix_cache_queries_total{}"] == 100
    assert values["vllm:prefix_cache_hits_total{}"] == 48
    assert values['triptych:decode_offloads_total{"instance": "d0", "role": "d"}'] == 4
    assert not [name for name in values if name.startswith(("triptych:prefix_", "triptych:embeddings_evicted"))]


def test_two_servers_in_one_process_count_for_themselves(stack: Stack) -> None:
    stack.chat()
    with Stack() as other:
        assert metrics(other)["vllm:time_to_first_token_seconds_count{}"] == 0


def test_a_request_id_is_given_or_kept(stack: Stack) -> None:
    response = stack.http.post("/v1/chat/completions", content=b"{", headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert stack.chat().json()["id"].startswith("chatcmpl-")
    first, second = (stack.http.get("/health").headers["x-request-id"] for _ in range(2))
    assert first != second
    indecent = stack.http.get("/health", headers={"x-request-id": "a b" * 100}).headers["x-request-id"]
    assert " " not in indecent


def test_version_ping_and_models(stack: Stack) -> None:
    assert stack.http.get("/version").json()["version"]
    assert stack.http.get("/ping").status_code == 200
    (card,) = stack.openai.models.list().data
    assert (card.id, card.owned_by) == ("fake", "triptych")
    assert stack.http.get("/v1/models").json()["data"][0]["max_model_len"] == 512
    assert stack.openai.models.retrieve("fake").id == "fake"


def test_the_description_covers_every_route_and_resolves_every_reference(stack: Stack) -> None:
    text = stack.http.get("/openapi.json").text
    document = json.loads(text)
    assert document["openapi"] == "3.1.0"
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models/{model}", "/cluster"} <= set(document["paths"])
    schemas = document["components"]["schemas"]
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= set(schemas)
    temperature = schemas["ChatRequest"]["properties"]["temperature"]
    assert temperature["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 100}


def test_the_description_has_every_kind_of_content(stack: Stack) -> None:
    schemas = stack.http.get("/openapi.json").json()["components"]["schemas"]
    content = schemas["ChatMessage"]["properties"]["content"]["anyOf"]
    (parts,) = (kind["items"] for kind in content if kind.get("type") == "array")
    mapping = next(kind["discriminator"]["mapping"] for kind in parts["anyOf"] if "discriminator" in kind)
    assert set(mapping) == {"text", "image_url", "video_url", "audio_url", "input_audio"}
    assert all("uuid" in schemas[f"{kind}Part"]["properties"] for kind in ("Image", "Video", "AudioUrl", "InputAudio"))
    assert {"num_frames", "fps"} == set(schemas["VideoIo"]["properties"])
    assert "prompt_tokens_details" in schemas["Usage"]["properties"]


# ---- changes of the cluster


class ScriptedControl:
    """Says what it is told to say, and remembers what it was asked for."""

    def __init__(self, *instances: Instance) -> None:
        self.instances = {instance.id: instance for instance in instances}
        self.events: list[Event] = []
        self.draining = False
        self.decision: Decision | None = None
        self.asked: list[object] = []
        self.refusal: RequestError | None = None

    async def switch_role(self, id: InstanceId, role: Role) -> dict[str, float]:
        self.asked.append((id, role))
        if self.refusal is not None:
            raise self.refusal
        self.instances[id].role = role
        return {"drain": 0.5, "total": 0.75}

    async def place(self, placement: Placement) -> list[Change]:
        self.asked.append(str(placement))
        if self.refusal is not None:
            raise self.refusal
        return [Change(instance=InstanceId("i7"), before=None, after=Role.E, steps_s={"start": 2.0})]


class Operator:
    """Asks a server whose instances are scripted."""

    def __init__(self, control: ScriptedControl | None, **config: object) -> None:
        telemetry = Telemetry("fake")
        frontend = Frontend(processor(), FakeCluster(script), telemetry)
        self._app = create_app(
            frontend,
            processor(),
            ServerConfig(served_model_names=("fake",), **config),  # type: ignore[arg-type]
            telemetry,
            max_model_len=512,
            control=control,
        )

    def ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        async def asking() -> httpx.Response:
            transport = httpx.ASGITransport(app=self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **request)

        return asyncio.run(asking())


def test_a_role_is_changed_and_the_steps_are_told() -> None:
    control = ScriptedControl(Instance(InstanceId("i1"), 0, Role.P))
    response = Operator(control).ask("POST", "/cluster/instances/i1/role", json={"role": "d"})
    assert response.status_code == 200
    assert response.json() == {"id": "i1", "role": "d", "steps_s": {"drain": 0.5, "total": 0.75}}
    assert control.asked == [("i1", Role.D)]


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        ("instances/i1/role", {"role": "x"}, "role", "role: 'x' is no role; roles are e, p, d, ep, pd, ed, epd"),
        ("instances/i1/role", {}, "role", "role: this field is required"),
        ("instances/i1/role", {"role": 3}, "role", "role"),
        ("instances/i1/role", [], None, "the body: expected an object, got an array"),
        ("placement", {"placement": "2x"}, "placement", "expected counts and roles such as 1e1p1d"),
        ("placement", {"placement": "1e1p"}, "placement", "no instance serves decode"),
        ("placement", {"placement": None}, "placement", "placement"),
    ],
)
def test_a_change_that_nobody_understands_is_refused_by_field(
    path: str, body: object, param: str | None, said: str
) -> None:
    control = ScriptedControl()
    response = Operator(control).ask("POST", f"/cluster/{path}", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert said in error["message"]
    assert control.asked == []


def test_a_change_that_fails_is_told_with_its_status() -> None:
    control = ScriptedControl(Instance(InstanceId("i1"), 0, Role.P))
    control.refusal = RequestError("i1 stays p", status=503, code="switch_timeout", retry_after_s=1.2)
    for path, body in (("instances/i1/role", {"role": "d"}), ("placement", {"placement": "1epd"})):
        response = Operator(control).ask("POST", f"/cluster/{path}", json=body)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "switch_timeout"
        assert response.headers["retry-after"] == "2"


def test_a_placement_is_changed_and_what_was_done_is_told() -> None:
    control = ScriptedControl(*(Instance(InstanceId(f"i{slot}"), slot, Role(role)) for slot, role in enumerate("dep")))
    body = Operator(control).ask("POST", "/cluster/placement", json={"placement": "2e1pd"}).json()
    assert control.asked == ["2e1pd"]
    assert body["placement"] == "1e1p1d", "as it is, in the order of the data"
    assert body["changes"] == [{"id": "i7", "before": None, "after": "e", "steps_s": {"start": 2.0}}]
    assert body["total_s"] >= 0


def test_changes_need_the_api_key_and_a_small_body() -> None:
    control = ScriptedControl(Instance(InstanceId("i1"), 0, Role.P))
    operator = Operator(control, api_key="secret")
    path, key = "/cluster/instances/i1/role", {"authorization": "Bearer secret"}
    assert operator.ask("POST", path, json={"role": "d"}).status_code == 401
    assert operator.ask("POST", "/cluster/placement", json={"placement": "1epd"}).status_code == 401
    assert operator.ask("GET", "/cluster").status_code == 401
    assert operator.ask("POST", path, json={"role": "d" * 100_000}, headers=key).status_code == 413
    assert control.asked == []
    assert operator.ask("POST", path, json={"role": "d"}, headers=key).status_code == 200


def test_a_server_without_control_says_that_it_cannot(stack: Stack) -> None:
    assert stack.http.post("/cluster/placement", json={"placement": "1epd"}).status_code == 501


def test_the_cluster_shows_what_happened_to_its_instances() -> None:
    lost = Instance(
        InstanceId("i0"),
        0,
        Role.E,
        state=State.RESTARTING,
        num_restarts=3,
        last_failure="killed by SIGKILL",
        started_at=time.time() - 5,
    )
    record = SwitchRecord(Role.PD, Role.P, at=17.0, steps_s={"drain": 1.0}, is_over=True)
    peer = make_peer("i1", Role.P, epoch="f00")
    control = ScriptedControl(
        lost, Instance(InstanceId("i1"), 1, Role.P, peer=peer, state=State.LEAVING, switch=record)
    )
    control.events = [Event(what="lost", instance=lost.id, text="killed", numbers={"suspects": 2.0}, at=16.0)]
    cluster = Operator(control).ask("GET", "/cluster").json()
    assert (cluster["placement"], cluster["draining"]) == ("1e1p", False)
    first, second = cluster["instances"]
    assert (first["state"], first["restarts"], first["last_failure"]) == ("restarting", 3, "killed by SIGKILL")
    assert (first["pid"], first["epoch"], first["switch"]) == (None, None, None)
    assert first["uptime_s"] == pytest.approx(5, abs=1)
    assert (second["state"], second["epoch"]) == ("leaving", "f00")
    assert second["switch"] == {
        "before": "pd",
        "after": "p",
        "at": 17.0,
        "state": "done",
        "steps_s": {"drain": 1.0},
        "error": None,
    }
    assert cluster["events"] == [
        {"at": 16.0, "what": "lost", "instance": "i0", "text": "killed", "numbers": {"suspects": 2.0}}
    ]


def test_a_server_that_is_about_to_stop_is_not_healthy() -> None:
    control = ScriptedControl()
    control.draining = True
    response = Operator(control).ask("GET", "/health")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "shutting_down"
    assert int(response.headers["retry-after"]) >= 1


def test_the_description_has_what_changes_the_cluster(stack: Stack) -> None:
    document = stack.http.get("/openapi.json").json()
    described = document["paths"]["/cluster/instances/{id}/role"]["post"]
    assert [parameter["name"] for parameter in described["parameters"]] == ["id"]
    assert "requestBody" in described
    assert "requestBody" in document["paths"]["/cluster/placement"]["post"]
    assert {"state", "restarts", "switch"} <= document["components"]["schemas"]["InstanceView"]["properties"].keys()
