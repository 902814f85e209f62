"""What `make bench` says: the table, the summary for machines, the picture.

Owns the ratios and their names; measures nothing.
"""

from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import TypeVar

from tests.bench.latency import Latency
from tests.bench.rig import Drained
from tests.bench.rivals import Pace

MS = 1e3
MB = 1e6
STEADY = 0.7  # of the measured maximum: the load at which latency is stated


@dataclass(frozen=True)
class Round:
    """The worker over pictures never seen, inline, and right after it all others over the same."""

    worker: Drained
    rivals: dict[str, Pace]


@dataclass
class Results:
    """Everything measured in one run; complete when it is reported.

    Of several rounds the middle counts, of a ratio the middle of the rounds' own ratios: the
    fastest of each would compare moments in which the machine was not the same.
    """

    rounds: list[Round] = field(default_factory=list)
    exact: Drained | None = None  # the same bytes under other ids
    files: Drained | None = None  # pictures never seen, file:// events
    # By kind of event, then by events a second: its rounds.
    latencies: dict[str, dict[float, list[Latency]]] = field(default_factory=dict)
    scaling: list[dict[int, Drained]] = field(default_factory=list)  # by number of workers
    redelivered: int = 0  # events

    @property
    def new(self) -> Drained:
        """The worker's middle round; its images a second are what is called the maximum."""
        return _middle([each.worker for each in self.rounds])

    def rival(self, name: str) -> Pace:
        """Its middle round."""
        return _middle([each.rivals[name] for each in self.rounds])

    def latency(self) -> dict[str, list[Latency]]:
        """By kind of event, at each load the round whose p50 is the middle one."""
        return {
            kind: [_middle(rounds, by="p50_seconds") for rounds in loads.values()]
            for kind, loads in self.latencies.items()
        }

    def speedup(self, name: str) -> float:
        """Images a second over a rival's."""
        return median(
            each.worker.images_per_second / each.rivals[name].images_per_second
            for each in self.rounds
        )


Measured = TypeVar("Measured", Drained, Pace, Latency)


def _middle(rounds: list[Measured], by: str = "images_per_second") -> Measured:
    return sorted(rounds, key=attrgetter(by))[len(rounds) // 2]


def summary(results: Results) -> dict[str, float]:
    """The figures a later run is compared with. Ratios are of processor time or of images/s."""
    new, exact = results.new, results.exact
    assert exact
    steady, by_uri = (_steady(each, new) for each in results.latency().values())
    return {
        "images_per_second": new.images_per_second,
        "ideal_images_per_second": results.rival("ideal").images_per_second,
        "cpu_ratio_to_ideal": median(
            each.worker.worker_cpu / each.rivals["ideal"].cpu_seconds for each in results.rounds
        ),
        "wall_ratio_to_ideal": results.speedup("ideal"),
        "speedup_over_fp32": results.speedup("fp32"),
        "speedup_over_fp32_alone": results.speedup("fp32 alone"),
        "ratio_to_pdq": results.speedup("pdq"),
        "exact_copy_cost_ratio": exact.worker_cpu / new.worker_cpu,
        "p50_seconds": steady.p50_seconds,
        "p99_seconds": steady.p99_seconds,
        "p50_seconds_by_uri": by_uri.p50_seconds,
        "p99_seconds_by_uri": by_uri.p99_seconds,
        "rss_bytes": float(max(each.worker.rss_bytes for each in results.rounds)),
        "redelivered_events": results.redelivered,
        **_cost_of_more(results.scaling),
    }


def _cost_of_more(rounds: list[dict[int, Drained]]) -> dict[str, float]:
    """Processor time an image over that of the fewest workers."""
    least, *more = sorted(rounds[0]) or [0]
    return {
        f"cpu_ratio_{count}_workers_to_{least}": median(
            each[count].worker_cpu / each[least].worker_cpu for each in rounds
        )
        for count in more
    }


def _steady(latencies: list[Latency], new: Drained) -> Latency:
    """The one at the load nearest to STEADY."""
    wanted = STEADY * new.images_per_second
    return min(latencies, key=lambda each: abs(each.events_per_second - wanted))


def print_results(results: Results) -> None:
    """Print tables of Markdown."""
    assert results.exact and results.files
    print("\n| over the same pictures | images/s | CPU ms/image |\n|---|---|---|")
    for name in results.rounds[0].rivals:
        pace = results.rival(name)
        print(f"| {name} | {pace.images_per_second:.0f} | {MS * pace.cpu_seconds:.2f} |")
    drained = {
        "worker, inline": results.new,
        "worker, file://": results.files,
        "worker, exact copies": results.exact,
        **{
            f"{count} workers": _middle([each[count] for each in results.scaling])
            for count in results.scaling[0]
        },
    }
    for name, each in drained.items():
        print(f"| {name} | {each.images_per_second:.0f} | {MS * each.worker_cpu:.2f} |")
    print("\n| CPU ms/image | new | exact copy |\n|---|---|---|")
    for stage, seconds in results.new.by_thread.items():
        print(f"| {stage} | {MS * seconds:.2f} | {_ms(results.exact, stage)} |")
    for name in ("broker_cpu", "redis_cpu"):
        new, exact = (MS * getattr(each, name) for each in (results.new, results.exact))
        print(f"| ({name.removesuffix('_cpu')}) | {new:.2f} | {exact:.2f} |")
    print("\n| events | a second | p50 ms | p99 ms | in stages, ms |\n|---|---|---|---|---|")
    for kind, latencies in results.latency().items():
        for at in latencies:
            times = (at.p50_seconds, at.p99_seconds, at.service_seconds)
            cells = " | ".join(f"{MS * each:.0f}" for each in times)
            print(f"| {kind} | {at.events_per_second:.0f} | {cells} |")
    print(f"\nverdicts {results.new.verdicts}, RSS {results.new.rss_bytes / MB:.0f} MB\n")
    for name, value in summary(results).items():
        print(f"{name:26}{value:.4g}")


def _ms(drained: Drained, stage: str) -> str:
    return f"{MS * drained.by_thread.get(stage, 0.0):.2f}"


def plot(latencies: dict[str, list[Latency]], path: Path) -> None:
    """Draw p50 and p99 against load, for each kind of event."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for style, (kind, measured) in zip(("o-", "o--"), latencies.items(), strict=True):
        rates = [each.events_per_second for each in measured]
        for colour, name in (("C0", "p99"), ("C1", "p50")):
            waits = [MS * getattr(each, f"{name}_seconds") for each in measured]
            axes.plot(rates, waits, style, color=colour, label=f"{name}, {kind}")
    axes.set(xlabel="events a second", ylabel="event to verdict, ms", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
