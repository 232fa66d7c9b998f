"""The table comes from one process and offers from others: a newcomer's offer may be there before the newcomer is."""

from pathlib import Path

from tests.builders import make_request
from tests.flows.engines import Hops, expected_answer, hops
from triptych.core import InstanceId, Role
from triptych.messages import Table


def tell(cluster: Hops, *names: str) -> None:
    """These get the newest table now, the others with the next."""
    cluster._version += 1
    for name in names:
        cluster.send(name, Table(cluster._version, list(cluster.peers.values())))


def add_unseen(cluster: Hops, name: str, role: str) -> None:
    engine = cluster._by_name[InstanceId(name)] = cluster._build(InstanceId(name), Role(role))
    cluster.peers[InstanceId(name)] = engine.peer


def test_kv_of_an_instance_that_the_table_does_not_name_yet_is_read_when_it_does(tmp_path: Path) -> None:
    with hops(tmp_path, e0="e", p0="p", d0="d") as cluster:
        add_unseen(cluster, "p1", "p")
        tell(cluster, "p1", "e0")
        order = make_request("r", num_images=1, max_tokens=4)
        cluster.ask(order, prefill="p1", encode="e0")
        cluster.settle()
        tell(cluster, *cluster.peers)
        cluster.settle()
        assert cluster.tokens_of(order) == expected_answer(order)
        assert all(not any(engine.load().queues.values()) for engine in cluster.engines)


def test_an_embedding_of_one_that_the_table_does_not_name_yet_is_read_when_it_does(tmp_path: Path) -> None:
    with hops(tmp_path, e0="e", p0="p", d0="d") as cluster:
        add_unseen(cluster, "e1", "e")
        tell(cluster, "e1", "d0")
        order = make_request("r", num_images=2, max_tokens=2)
        cluster.ask(order, prefill="p0", encode="e1")
        cluster.settle()
        tell(cluster, *cluster.peers)
        cluster.settle()
        assert cluster.tokens_of(order) == expected_answer(order)
        assert all(not any(engine.load().queues.values()) for engine in cluster.engines)
