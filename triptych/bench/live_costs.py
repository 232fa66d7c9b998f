"""Loads on real servers of two placements, and what their processes took of the cores: what a calibration needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from triptych.bench.report import Record
from triptych.bench.serving import LiveServer, Load, server
from triptych.bench.workload import picture
from triptych.core import Placement
from triptych.planning.costs.profile import Profile
from triptych.planning.simulation.calibration import LiveRun, capacity
from triptych.planning.workloads.demand import Demand, Item

PLACEMENTS = ("1epd", "1e1p1d")
FEWEST, MOST = 12, 400  # requests of one load
LONGEST_S = 60.0  # of one load; what would take longer is left out
PROBES = 3


@dataclass(frozen=True, slots=True)
class Ask:
    """One kind of request, at a share of what the placement could do."""

    words: int
    output_tokens: int
    share: float
    images: int = 0
    side: int = 224  # pixels


@dataclass(frozen=True, slots=True)
class Effort:
    asks: tuple[Ask, ...]
    seconds: float  # of arrivals, of each


FULL = Effort(
    (
        Ask(40, 24, 0.3),
        Ask(400, 12, 0.4),
        Ask(150, 64, 0.5),
        Ask(32, 24, 0.3, images=1, side=448),
        Ask(32, 12, 0.4, images=6),
        Ask(32, 24, 0.5, images=3, side=448),
        Ask(32, 6, 0.4, images=1, side=1120),
        Ask(24, 48, 3.0),  # more than it can do: large batches tell steps from tokens at the server
    ),
    4.0,
)
QUICK = Effort((Ask(150, 32, 0.4), Ask(400, 8, 0.3), Ask(32, 16, 0.4, images=3, side=448), Ask(24, 32, 3.0)), 3.0)
SIDES = sorted({ask.side for effort in (FULL, QUICK) for ask in effort.asks if ask.images})


@dataclass(frozen=True, slots=True)
class Pictures:
    """What a model makes of square pictures."""

    rows: Mapping[int, tuple[int, ...]]  # of the units of one, by its side in pixels
    lead_tokens: int  # of the prompt, before the first one

    def item(self, side: int) -> Item:
        return Item(self.rows[side], side * side, len(picture((0, 0, 0), side, side, "jpeg")))


def live_runs(
    arguments: Sequence[str], profile: Profile, pictures: Pictures | None, effort: Effort, done: Callable[[str], None]
) -> tuple[list[LiveRun], float]:
    """The runs, and how long a request waits on its way to the server and back. `pictures`: None where the model takes
    none. Raises InstanceError if a server does not start or refuses a request."""
    runs: list[LiveRun] = []
    arrival_s = 0.0
    for name in PLACEMENTS:
        with server(["--placement", name, *arguments]) as (url, pid):
            live = LiveServer(url, pid)
            done(f"server {name} started")
            arrival_s = arrival_s or live.waiting_s()
            for ask in effort.asks:
                if not ask.images or pictures is not None:
                    run = asked(live, Placement.parse(name), profile, pictures, ask, effort.seconds)
                    runs += [] if run is None else [run]
                done("requests")
    return runs, arrival_s


def asked(
    live: LiveServer, placement: Placement, profile: Profile, pictures: Pictures | None, ask: Ask, seconds: float
) -> LiveRun | None:
    """None where it would take too long."""
    probe = live.serve(_load(ask, 1e3, PROBES))
    sizes, costs = profile.as_served(placement), profile.costs()
    rate = ask.share * capacity(costs, sizes, placement, _demands(probe.requests, ask, pictures)[0])
    num_requests = round(min(MOST, max(FEWEST, rate * seconds)))
    if num_requests / rate > LONGEST_S:
        return None
    found = live.serve(_load(ask, rate, num_requests))
    demands = _demands(found.requests, ask, pictures)
    instances_s = found.instances_s if ask.share < 1 else ()  # what waits everywhere is no usual load of theirs
    return LiveRun(placement, sizes, demands, instances_s, found.server_s, found.client_s)


def _load(ask: Ask, rate: float, requests: int) -> Load:
    return Load(rate, requests, ask.words, ask.output_tokens, ask.images, ask.side)


def _demands(records: Sequence[Record], ask: Ask, pictures: Pictures | None) -> list[Demand]:
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
