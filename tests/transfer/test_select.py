import sys

import pytest

from tests.transfer.holders import holding, reading
from triptych.errors import ConfigError, InstanceError
from triptych.messages import SlabDescription
from triptych.transfer.select import choose, host_id, transports_for


def make_description(*transports: str, host: str = "here", device: str = "cpu") -> SlabDescription:
    return SlabDescription(dict.fromkeys(transports, b""), host, device, 0, {})


def test_auto_offers_shared_memory_alone_to_cpu_slabs_of_one_host() -> None:
    assert transports_for("auto", "cpu", multi_host=False) == ["shm"]
    assert transports_for("auto", "cpu", multi_host=True) == ["shm", "nixl"]
    assert transports_for("auto", "cuda:0", multi_host=False) == ["nixl"]
    assert transports_for("auto", "cuda:0", multi_host=True) == ["nixl"]


def test_a_fixed_mode_offers_itself_alone() -> None:
    assert transports_for("nixl", "cpu", multi_host=True) == ["nixl"]
    assert transports_for("shm", "cpu", multi_host=True) == ["shm"]
    with pytest.raises(ConfigError, match="cuda:1"):
        transports_for("shm", "cuda:1", multi_host=False)


def test_shared_memory_is_chosen_on_one_host_and_nixl_between_two() -> None:
    both = make_description("shm", "nixl")
    assert choose("auto", both, make_description("shm", "nixl")) == "shm"
    assert choose("auto", both, make_description("shm", "nixl", host="there")) == "nixl"
    assert choose("auto", both, make_description("nixl", device="cuda:0")) == "nixl"
    assert choose("nixl", both, make_description("shm", "nixl")) == "nixl"


def test_slabs_without_a_common_transport_are_refused() -> None:
    with pytest.raises(InstanceError, match="there"):
        choose("auto", make_description("shm"), make_description("shm", host="there"))
    with pytest.raises(InstanceError, match="cuda:0"):
        choose("auto", make_description("shm"), make_description("nixl", device="cuda:0"))


def test_a_host_is_itself() -> None:
    assert host_id() == host_id()


def test_nixl_is_not_imported_where_shared_memory_does() -> None:
    with holding("auto") as holder:
        assert not [name for name in holder.ask("modules") if name.startswith("nixl")]


def test_a_missing_nixl_is_refused_with_the_name_of_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for wheel in ("nixl_cu13", "nixl_cu12"):
        monkeypatch.setitem(sys.modules, f"{wheel}._bindings", None)
    with pytest.raises(ConfigError, match=r"pip install 'triptych\[nixl-cu1[23]\]'"), reading("nixl"):
        pass
