"""Workloads by name, for those who have no file yet, and files by path."""

import os
from difflib import get_close_matches
from pathlib import Path

from msgspec.structs import replace

from triptych.errors import ConfigError
from triptych.planning import files
from triptych.planning.quantities import PerSecond, PositiveSeconds
from triptych.planning.workloads.arrivals import Poisson
from triptych.planning.workloads.distributions import Lognormal, SizeValues, Values
from triptych.planning.workloads.kinds import Images, Kind, Videos
from triptych.planning.workloads.workload import Slo, Workload

PAPER_SLO = {2: ("1.4 s", "40 ms"), 4: ("2.6 s", "40 ms"), 6: ("3.9 s", "60 ms"), 8: ("5.1 s", "60 ms")}


def paper_synthetic(images_per_request: int = 4, rate: float = 0.25, num_requests: int = 100) -> Workload:
    """The synthetic load of the paper (arXiv 2501.05460, section 4), with the SLO of its Table 9 for MiniCPM-V 2.6."""
    ttft, tpot = PAPER_SLO.get(images_per_request, (None, None))
    images = Images(size="4032x3024", count=images_per_request) if images_per_request else None
    return Workload(
        name=f"paper-synthetic-{images_per_request}",
        arrivals=Poisson(rate=PerSecond(rate)),
        kinds={"pictures": Kind(text_tokens=22, output_tokens=10, images=images)},
        num_requests=num_requests,
        slo=Slo(ttft=PositiveSeconds.parse(ttft), tpot=PositiveSeconds.parse(tpot)) if ttft and tpot else None,
    )


CHAT = Kind(
    text_tokens=Lognormal(mean=400, cv=1.5, least=8, most=8000),
    output_tokens=Lognormal(mean=200, cv=1.0, least=1, most=2000),
)
USUAL_SIZES = SizeValues(
    values=["640x480", "1024x768", "768x1024", "1280x720", "1920x1080", "1080x1920", "4032x3024"],
    weights=[2, 3, 2, 2, 2, 2, 1],
)
PICTURES = Kind(
    text_tokens=Lognormal(mean=80, cv=1.0, least=8, most=2000),
    output_tokens=Lognormal(mean=150, cv=1.0, least=1, most=1500),
    images=Images(size=USUAL_SIZES, count=Values(values=[1, 2, 3, 4, 8], weights=[60, 20, 10, 7, 3])),
)
CLIPS = Kind(
    text_tokens=Lognormal(mean=60, cv=1.0, least=8, most=1000),
    output_tokens=Lognormal(mean=120, cv=1.0, least=1, most=1000),
    videos=Videos(size=["1280x720", "720x1280"], frames=[8, 16, 32]),
)
USUAL_SLO = Slo(ttft=PositiveSeconds(2), tpot=PositiveSeconds(0.05))


def _usual(name: str, **kinds: Kind) -> Workload:
    return Workload(name=name, arrivals=Poisson(rate=PerSecond(1)), kinds=kinds, num_requests=1000, slo=USUAL_SLO)


PRESETS = {
    "text": _usual("text", chat=CHAT),
    "pictures": _usual("pictures", pictures=PICTURES),
    "mixed": _usual(
        "mixed", chat=replace(CHAT, weight=6), pictures=replace(PICTURES, weight=3), clips=replace(CLIPS, weight=1)
    ),
    "paper-synthetic": paper_synthetic(),
} | {f"paper-synthetic-{images}": paper_synthetic(images) for images in PAPER_SLO}


def load(name: str | Path) -> Workload:
    """A preset by its name, or a file. Raises ConfigError naming the presets, or the file and what is wrong in it.

    The path of a trace in a file begins at the folder of that file.
    """
    if name in PRESETS:
        return PRESETS[str(name)]
    path = Path(name)
    if not path.suffix and not os.path.exists(path):
        close = get_close_matches(str(name), PRESETS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"{name}: neither a workload file nor a preset; {hint}presets are {', '.join(PRESETS)}")
    workload = files.read(path, Workload)
    if workload.trace is None:
        return workload
    return replace(workload, trace=replace(workload.trace, path=str(path.parent / workload.trace.path)))
