"""Devices from data sheets and from users' files."""

import json
from pathlib import Path

import pytest

from triptych.errors import ConfigError
from triptych.planning.costs.hardware import find_device, known_devices

MINE = {
    "flops": "100 TFLOP/s",
    "memory_bandwidth": "1 TB/s",
    "memory": "16 GiB",
    "link": "32 GB/s",
    "host_link": "16 GB/s",
    "price": "0.5 USD/h",
}


def write(path: Path, devices: dict[str, object]) -> Path:
    path.write_text(json.dumps({"devices": devices}))
    return path


def test_every_known_device_says_where_its_numbers_come_from() -> None:
    known = known_devices()
    assert set(known) >= {"A100-40G", "A100-80G", "H100", "H200", "L40S", "RTX-4090", "MI300X", "Ascend-910B"}
    for name, device in known.items():
        assert device.name == name
        assert len(device.source) > 40
        assert device.price is None or "assumption" in device.source
        assert device.host_link <= device.memory_bandwidth / 10


def test_devices_are_found_by_name_in_any_case() -> None:
    assert find_device("a100-80g") == known_devices()["A100-80G"]
    assert find_device("H100").flops == pytest.approx(989.4e12)


def test_a_users_file_of_one_device_or_of_several(tmp_path: Path) -> None:
    one = write(tmp_path / "one.json", {"mine": MINE})
    assert find_device(str(one)).name == "mine"
    assert find_device(str(one)).memory == 16 * 2**30
    several = write(tmp_path / "several.json", {"mine": MINE, "other": MINE | {"price": None}})
    assert find_device(f"{several}:other").price is None
    with pytest.raises(
        ConfigError, match=r"several.json: describes several devices; write .*:NAME with one of mine, oth"
    ):
        find_device(str(several))
    with pytest.raises(ConfigError, match="has no device 'third'"):
        find_device(f"{several}:third")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flops": 100}, "devices.mine.flops: 100 has no unit; use PFLOP/s"),
        ({"flops": "100 GB/s"}, "devices.mine.flops: '100 GB/s' has the unit 'GB/s'"),
        ({"memory": "-1 GB"}, "devices.mine.memory: '-1 GB' is out of range"),
        ({"memory": "0 GB"}, "memory: 0 B is not valid; above 0 B is needed"),
        ({"memroy": "1 GB"}, "devices.mine.memroy: unknown key; did you mean 'memory'?"),
        ({"price": "nan USD/h"}, "devices.mine.price"),
    ],
)
def test_hardware_file_that_is_wrong_is_refused_by_file_and_key(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    path = write(tmp_path / "hardware.json", {"mine": MINE | change})
    with pytest.raises(ConfigError) as refused:
        find_device(str(path))
    assert str(path) in str(refused.value)
    assert words in str(refused.value)


def test_device_that_is_nowhere_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--gpu: 'B300' is neither a hardware file nor one of A100-40G, A100-80G"):
        find_device("B300")
    for name in ("a" * 5000, "a\0b", ""):
        with pytest.raises(ConfigError, match="is neither a hardware file nor one of"):
            find_device(name)
    with pytest.raises(ConfigError, match="devices: is empty"):
        find_device(str(write(tmp_path / "empty.json", {})))
