"""What a test and the instances under it agree on by files of one folder: which fault, at which moment, on whom.

`armed` is consumed by the instance that gets to the moment first, by renaming it: so a fault happens once, and the
incarnation that is started afterwards does not repeat it.
"""

import enum
import os
import time
from pathlib import Path

import msgspec

from triptych.core import InstanceId

WAIT_S = 3.0  # for the other side of a transfer to be where it is wanted


class Moment(enum.StrEnum):
    """How far some request of the instance is."""

    QUEUED = "queued"  # taken from the inbox, not begun
    ENCODING = "encoding"  # inside the encoder
    EMBEDDING = "embedding-in-transfer"  # announced and being read: its reader's or its holder's
    PREFILLING = "prefilling"  # inside a forward over a part of its prompt
    BETWEEN = "between-chunks"  # a part of its prompt is computed, no forward runs
    KV = "kv-in-transfer"  # announced and being read: its reader's or its holder's
    DECODING = "decoding"  # inside a forward for a further token
    FINISHING = "finishing"  # the last token is sampled and not sent
    FINISHED = "finished"  # the last token is sent


TRANSFERS = {Moment.EMBEDDING: "embedding", Moment.KV: "kv"}  # and the region that they read


class Fault(enum.StrEnum):
    KILL = "sigkill"
    STOP = "sigstop"
    BREAK = "transport-broken"  # no pull by this incarnation nor from it succeeds any more


class Arming(msgspec.Struct, frozen=True):
    number: int
    moment: Moment
    fault: Fault
    instances: list[InstanceId]  # the first of these that gets there
    num_tokens: int = 3  # of the answer, when it is decoding
    waits: bool = False  # who is there stands still until `release`


class Fired(msgspec.Struct, frozen=True):
    """What happened: on whom."""

    instance: InstanceId
    epoch: str
    pid: int


class Poison(msgspec.Struct, frozen=True):
    """A request kills every instance that is at that moment of it: one with this seed, or with media that end so."""

    moment: Moment
    seed: int = -1
    ending: bytes = b"\0"


class Points:
    """The folder."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._armed = str(self.folder / "armed")

    # ---- the test's side

    def arm(self, arming: Arming) -> None:
        self._write("armed", arming)

    def release(self, number: int) -> None:
        """Everything is as it has to be: the fault may happen."""
        self.tell(f"released-{number}")

    def disarm(self) -> None:
        (self.folder / "armed").unlink(missing_ok=True)

    def poison(self, poison: Poison) -> None:
        self._write("poison", poison)

    def cure(self) -> None:
        for name in ("poison", "deaths"):
            (self.folder / name).unlink(missing_ok=True)

    @property
    def deaths(self) -> list[InstanceId]:
        """Who died of the poison, in order."""
        file = self.folder / "deaths"
        return [InstanceId(line) for line in file.read_text().split()] if file.exists() else []

    def is_broken(self, instance: InstanceId, epoch: str) -> bool:
        return (self.folder / f"broken-{instance}-{epoch}").exists()

    def fired(self, number: int) -> Fired | None:
        file = self.folder / f"fired-{number}"
        return msgspec.json.decode(file.read_bytes(), type=Fired) if file.exists() else None

    # ---- the instances' side

    def armed(self) -> Arming | None:
        try:
            with open(self._armed, "rb") as file:
                return msgspec.json.decode(file.read(), type=Arming)
        except FileNotFoundError:
            return None

    def poisoned(self) -> Poison | None:
        try:
            return msgspec.json.decode((self.folder / "poison").read_bytes(), type=Poison)
        except FileNotFoundError:
            return None

    def die(self, instance: InstanceId) -> None:
        file = os.open(self.folder / "deaths", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{instance}\n".encode())
        os.close(file)

    def consume(self, arming: Arming, fired: Fired) -> bool:
        """Whether the fault is the caller's. It is told before it happens."""
        if arming.waits:
            self.wait_for(f"released-{arming.number}")
        try:
            os.rename(self._armed, self.folder / f"consumed-{arming.number}")
        except FileNotFoundError:
            return False
        if arming.fault is Fault.BREAK:
            (self.folder / f"broken-{fired.instance}-{fired.epoch}").touch()
        self._write(f"fired-{arming.number}", fired)
        return True

    def tell(self, name: str) -> None:
        (self.folder / name).touch()

    def wait_for(self, name: str) -> bool:
        """Whether it was told in time."""
        deadline = time.monotonic() + WAIT_S
        while not (self.folder / name).exists():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def _write(self, name: str, content: msgspec.Struct) -> None:
        draft = self.folder / f"{name}.{os.getpid()}"
        draft.write_bytes(msgspec.json.encode(content))
        draft.rename(self.folder / name)
