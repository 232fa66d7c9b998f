"""Loads on real servers of two placements, and what they took of the cores: what a calibration needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from triptych.bench.report import Record
from triptych.bench.serving import Ask, LiveServer, server
from triptych.bench.workload import picture
from triptych.core import Placement
from triptych.errors import InstanceError
from triptych.planning.costs.profile import Profile
from triptych.planning.simulation.calibration import LiveRun, capacity
from triptych.planning.workloads.demand import Demand, Item

PLACEMENTS = ("1epd", "1e1p1d")
FEWEST, MOST = 12, 400  # requests of one load
LONGEST_S = 60.0  # of one load; what would take longer is left out
FIRST = 12  # requests before it, so that it finds a server that has done the like


@dataclass(frozen=True, slots=True)
class Effort:
    """What is asked, each at a share of what the placement could do."""

    asks: tuple[tuple[Ask, float], ...]
    seconds: float  # of arrivals, of each


FULL = Effort(
    (
        (Ask(8, 24), 0.1),
        (Ask(8, 4), 0.5),  # short answers tell requests from tokens
        (Ask(400, 12), 0.4),
        (Ask(150, 64), 0.4),
        (Ask(8, 24, images=1, side=448), 0.1),
        (Ask(32, 12, images=6), 0.4),
        (Ask(8, 24, images=3, side=448), 0.5),
        (Ask(8, 6, images=1, side=1120), 0.6),
        (Ask(24, 48), 3.0),  # more than it can do: large batches tell steps from tokens at the server
    ),
    6.0,
)
QUICK = Effort(
    (
        (Ask(150, 32), 0.2),
        (Ask(400, 8), 0.4),
        (Ask(8, 16, images=3, side=448), 0.4),
        (Ask(8, 6, images=1, side=1120), 0.3),
        (Ask(24, 32), 3.0),
    ),
    3.0,
)
SIDES = sorted({ask.side for effort in (FULL, QUICK) for ask, _ in effort.asks if ask.images})


@dataclass(frozen=True, slots=True)
class Pictures:
    """What a model makes of square pictures."""

    rows: Mapping[int, tuple[int, ...]]  # of the units of one, by its side in pixels
    lead_tokens: int  # of the prompt, before the first one

    def item(self, side: int) -> Item:
        return Item(self.rows[side], side * side, len(picture((0, 0, 0), side, side, "jpeg")))


@dataclass(frozen=True, slots=True)
class Live:
    """What real servers showed: `arrival_s` is how long a request waits on its way there and back. `notes`: what could
    not be measured."""

    runs: Sequence[LiveRun]
    arrival_s: float
    notes: Sequence[str]


def live_runs(
    arguments: Sequence[str], profile: Profile, pictures: Pictures | None, effort: Effort, done: Callable[[], None]
) -> Live:
    """`pictures`: None where the model takes none. A placement that cannot be served here is noted, not missed."""
    runs: list[LiveRun] = []
    notes: list[str] = []
    arrival_s = 0.0
    for name in PLACEMENTS if profile.made.device == "cpu" else PLACEMENTS[:1]:  # three instances want three devices
        placement = Placement.parse(name)
        try:
            with server(["--placement", name, *arguments]) as (url, pid):
                live = LiveServer(url, pid)
                done()
                arrival_s = arrival_s or live.waiting_s()
                for ask, share in effort.asks:
                    run = asked(live, placement, profile, pictures, ask, share, effort.seconds)
                    runs += [] if run is None else [run]
                    done()
        except InstanceError as error:
            notes.append(f"not measured with {name}: {error}")
    if not runs:
        notes.append("what serving costs is not known: no load was measured")
    return Live(runs, arrival_s, notes)


def asked(
    live: LiveServer,
    placement: Placement,
    profile: Profile,
    pictures: Pictures | None,
    ask: Ask,
    share: float,
    seconds: float,
) -> LiveRun | None:
    """None where it would take too long, and of pictures where the model takes none."""
    if ask.images and pictures is None:
        return None
    probe = live.serve(ask, rate=1e3, requests=1)
    sizes, costs = profile.as_served(placement), profile.costs()
    rate = share * capacity(costs, sizes, placement, demands_of(probe.requests, ask, pictures)[0])
    num_requests = round(min(MOST, max(FEWEST, rate * seconds)))
    if num_requests / rate > LONGEST_S:
        return None
    live.serve(ask, rate=1e3, requests=FIRST)
    found = live.serve(ask, rate=rate, requests=num_requests)
    demands = demands_of(found.requests, ask, pictures)
    instances = found.instances if share < 1 else ()  # what waits everywhere is no usual load of theirs
    return LiveRun(placement, sizes, demands, instances, found.server_s, found.client_s)


def demands_of(records: Sequence[Record], ask: Ask, pictures: Pictures | None) -> list[Demand]:
    """The requests that the server got: when, and of which size."""
    media: tuple[Item, ...] = ()
    if ask.images:
        assert pictures is not None
        media = (pictures.item(ask.side),) * ask.images
    num_rows = sum(sum(item.rows) for item in media)
    lead_tokens = 0 if pictures is None else pictures.lead_tokens
    return [
        Demand(
            record.scheduled_s,
            media,
            (record.prompt_tokens or 0) - num_rows,
            record.completion_tokens or 1,
            lead_tokens=lead_tokens,
        )
        for record in records
    ]
