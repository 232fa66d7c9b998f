"""What a device computes, holds and moves in a second, and what it costs: from data sheets, or from a user's file."""

import os
from importlib import resources
from typing import Annotated

import msgspec

from triptych.errors import ConfigError
from triptych.planning import files
from triptych.planning.quantities import Bytes, BytesPerSecond, DollarsPerHour, FlopPerSecond

Name = Annotated[str, msgspec.Meta(min_length=1)]


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One accelerator. Peaks, which nothing reaches: see `analytic` for how much of them is."""

    flops: FlopPerSecond  # dense FP16 or BF16, as tensors are multiplied
    memory_bandwidth: BytesPerSecond
    memory: Bytes  # that programs can have
    link: BytesPerSecond  # to one peer, one way
    host_link: BytesPerSecond  # to the memory of its host, one way
    price: DollarsPerHour | None = None
    source: str = ""
    name: str = ""  # as it is listed

    def __post_init__(self) -> None:
        if not self.memory:
            raise ValueError("memory: 0 B is not valid; above 0 B is needed")


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A hardware file."""

    devices: dict[Name, Device]

    def __post_init__(self) -> None:
        if not self.devices:
            raise ValueError("devices: is empty; at least one is needed")


def known_devices() -> dict[str, Device]:
    """Those that are described here."""
    with resources.as_file(resources.files("triptych.planning") / "data" / "hardware.json") as path:
        return _named(files.read(path, Hardware))


def find_device(text: str) -> Device:
    """Of a name ("A100-80G"), a hardware file that describes one device, or one of several: "my.json:A100-80G".

    Raises ConfigError naming the devices that there are.
    """
    path, _, name = text.rpartition(":") if ":" in text and not os.path.exists(text) else (text, "", "")
    if os.path.isfile(path):
        return _pick(_named(files.read(path, Hardware)), name, path)
    known = known_devices()
    found = next((device for other, device in known.items() if other.lower() == text.lower()), None)
    if found is None:
        raise ConfigError(f"--gpu: {text!r} is neither a hardware file nor one of {', '.join(known)}")
    return found


def _named(hardware: Hardware) -> dict[str, Device]:
    return {name: msgspec.structs.replace(device, name=name) for name, device in hardware.devices.items()}


def _pick(devices: dict[str, Device], name: str, path: str) -> Device:
    if not name and len(devices) == 1:
        return next(iter(devices.values()))
    if name not in devices:
        wanted = f"has no device {name!r}" if name else "describes several devices"
        raise ConfigError(f"{path}: {wanted}; write {path}:NAME with one of {', '.join(devices)}")
    return devices[name]
