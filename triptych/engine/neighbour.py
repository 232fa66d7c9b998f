"""Another engine on this machine, in its own process, that works while it is asked to: steps cost more beside it."""

import multiprocessing
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.connection import Connection
from statistics import median

import torch

from triptych.config import InstanceConfig
from triptych.engine.fitting import Fitter
from triptych.engine.heap import keep_large_blocks
from triptych.engine.rig import Rig
from triptych.errors import ConfigError, InstanceError

SIDE = 448  # pixels of the pictures of both
TOKENS, OUTPUT_TOKENS = 120, 24  # of the requests that are compared
BESIDE_TOKENS, BESIDE_OUTPUT_TOKENS = 64, 12  # of those of the other engine
LIMIT_S = 600.0  # of its silence: it loads a model first
CLOSE_S = 10.0  # until it has seen that nobody listens: it finishes what it does
FEWEST, ENOUGH_S = 4, 60.0  # comparisons that are enough after so long


def crowding(rig: Rig, beside: InstanceConfig, comparisons: int) -> dict[str, float]:
    """How much longer steps of an engine take for each core of another one that works beside it, as a share of their
    time: encode_crowding (where the model takes pictures), prefill_crowding, decode_crowding.

    It is no question of who gets a core: the two share caches and the way to memory. Steps alone and beside the other
    one take turns, so that a slow minute of the machine is both's. `beside`: of the other one. Raises InstanceError
    where it does not start, or ends.
    """
    ratios: dict[str, list[float]] = {}
    neighbour, ends_at = Neighbour(beside), time.perf_counter() + ENOUGH_S
    try:
        for number in range(comparisons):
            if number >= FEWEST and time.perf_counter() > ends_at:
                break
            found: dict[bool, dict[str, float]] = {}
            for crowded in (True, False) if number % 2 else (False, True):  # neither is always the second one
                with neighbour.working() if crowded else nullcontext():
                    found[crowded] = usual_steps(rig, beside)
            for stage, seconds in found[False].items():
                ratios.setdefault(f"{stage}_crowding", []).append(found[True][stage] / seconds)
    finally:
        neighbour.close()
    return {name: max(0.0, median(of) - 1.0) / beside.threads for name, of in ratios.items()}


def usual_steps(rig: Rig, config: InstanceConfig) -> dict[str, float]:
    """Seconds of one step of each stage, with caches as warm as those of an engine that has work."""
    half = _half(config)
    rig.play([rig.text(min(TOKENS, half), 1)])
    answered = rig.play([rig.text(min(TOKENS, half), min(OUTPUT_TOKENS, half))])
    by_kind = {
        decodes: [turn.language_s for turn in answered if {of for _, _, of in turn.chunks} == {decodes}]
        for decodes in (False, True)
    }
    seconds = {"prefill": median(by_kind[False]), "decode": median(by_kind[True])}
    if rig.takes_pictures:
        turns = rig.play([rig.pictures(SIDE, SIDE, 1)])
        seconds["encode"] = median(turn.encode_s for turn in turns if turn.works)
    return seconds


class Neighbour:
    """`working()`: it encodes, prefills and decodes as long as one is inside. Raises InstanceError where it ended."""

    def __init__(self, config: InstanceConfig) -> None:
        """Returns when it is ready, and at rest. Raises InstanceError also where there is no memory for a second
        engine."""
        spawning = multiprocessing.get_context("spawn")
        self._connection, theirs = spawning.Pipe()
        self._process = spawning.Process(target=work_beside, args=(theirs, config), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._heard()
        except InstanceError:
            self.close()
            raise

    @contextmanager
    def working(self) -> Iterator[None]:
        self._tell()
        self._heard()
        yield
        self._tell()
        self._heard()

    def close(self) -> None:
        """Lets it end by itself, so that it takes with it what it made on this machine."""
        self._connection.close()
        self._process.join(CLOSE_S)
        self._process.terminate()
        self._process.join()

    def _tell(self) -> None:
        try:
            self._connection.send(None)
        except OSError as error:
            raise InstanceError("the engine beside the one that is measured ended") from error

    def _heard(self) -> None:
        try:
            if not self._connection.poll(LIMIT_S):
                raise InstanceError(f"the engine beside the one that is measured was silent for {LIMIT_S:g} s")
            problem = self._connection.recv()
        except (EOFError, OSError) as error:
            raise InstanceError("the engine beside the one that is measured ended") from error
        if problem:
            raise InstanceError(problem)


def work_beside(connection: Connection, config: InstanceConfig) -> None:
    """In the other process. Each word from the first one begins work or ends it, and is answered when that is so, with
    what is in the way, if anything is; it is over when the first one is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first one ends it
    keep_large_blocks()
    torch.set_num_threads(config.threads)
    with torch.inference_mode(), suppress(EOFError, OSError):
        try:
            rig = Rig(config, Fitter(config), time.perf_counter)
            _work(rig, config)
        except ConfigError as error:
            connection.send(str(error))
            return
        connection.send(None)
        while True:
            connection.recv()
            connection.send(None)
            while not connection.poll():
                _work(rig, config)
            connection.recv()
            connection.send(None)


def _work(rig: Rig, config: InstanceConfig) -> None:
    half = _half(config)
    rig.play([rig.text(min(BESIDE_TOKENS, half), min(BESIDE_OUTPUT_TOKENS, half))])
    if rig.takes_pictures:
        rig.play([rig.pictures(SIDE, SIDE, 1)])


def _half(config: InstanceConfig) -> int:
    """Of the tokens that a request may have: so many for its prompt, so many for its answer."""
    assert config.model.max_model_len is not None
    return config.model.max_model_len // 2
