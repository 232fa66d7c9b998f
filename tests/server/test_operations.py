"""What operators read: health, metrics, the cluster, request ids, the description of the API."""

import json
from collections.abc import Iterator

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.fakes import ANSWER, COUNTERS, D, E, P, Stack, ids
from tests.server.test_leaving import on_loop
from triptych.core import Role
from triptych.messages import Table


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
