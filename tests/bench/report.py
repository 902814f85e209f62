"""What `make bench` says: the table, the summary for machines, the picture.

Owns the ratios and their names; measures nothing.
"""

from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.latency import Latency
from tests.bench.rig import Drained
from tests.bench.rivals import Pace

MS = 1e3
MB = 1e6
STEADY = 0.7  # of the measured maximum: the load at which latency is stated


@dataclass
class Results:
    """Everything measured in one run; complete when it is reported."""

    rivals: dict[str, Pace] = field(default_factory=dict)
    new: Drained | None = None  # pictures never seen, inline
    exact: Drained | None = None  # the same bytes under other ids
    files: Drained | None = None  # pictures never seen, file:// events
    latencies: dict[str, list[Latency]] = field(default_factory=dict)  # by kind of event
    scaling: dict[int, Drained] = field(default_factory=dict)


def summary(results: Results) -> dict[str, float]:
    """The figures a later run is compared with. Ratios are of processor time or of images/s."""
    new, exact = results.new, results.exact
    assert new and exact
    steady, by_uri = (_steady(each, new) for each in results.latencies.values())
    rivals = ("ideal", "fp32", "fp32 alone", "pdq")
    ideal, fp32, fp32_alone, pdq = (results.rivals[name] for name in rivals)
    least = min(results.scaling, default=0)
    return {
        "images_per_second": new.images_per_second,
        "ideal_images_per_second": ideal.images_per_second,
        "cpu_ratio_to_ideal": new.worker_cpu / ideal.cpu_seconds,
        "wall_ratio_to_ideal": new.images_per_second / ideal.images_per_second,
        "speedup_over_fp32": new.images_per_second / fp32.images_per_second,
        "speedup_over_fp32_alone": new.images_per_second / fp32_alone.images_per_second,
        "ratio_to_pdq": new.images_per_second / pdq.images_per_second,
        "exact_copy_cost_ratio": exact.worker_cpu / new.worker_cpu,
        "p50_seconds": steady.p50_seconds,
        "p99_seconds": steady.p99_seconds,
        "p50_seconds_by_uri": by_uri.p50_seconds,
        "p99_seconds_by_uri": by_uri.p99_seconds,
        "rss_bytes": float(new.rss_bytes),
        **{
            f"cpu_ratio_{count}_workers_to_{least}": each.worker_cpu
            / results.scaling[least].worker_cpu
            for count, each in results.scaling.items()
            if count != least
        },
    }


def _steady(latencies: list[Latency], new: Drained) -> Latency:
    """The one at the load nearest to STEADY."""
    wanted = STEADY * new.images_per_second
    return min(latencies, key=lambda each: abs(each.events_per_second - wanted))


def print_results(results: Results) -> None:
    """Print tables of Markdown."""
    assert results.new and results.exact and results.files
    print("\n| over the same pictures | images/s | CPU ms/image |\n|---|---|---|")
    for name, pace in results.rivals.items():
        print(f"| {name} | {pace.images_per_second:.0f} | {MS * pace.cpu_seconds:.2f} |")
    drained = {
        "worker, inline": results.new,
        "worker, file://": results.files,
        "worker, exact copies": results.exact,
        **{f"{count} workers": each for count, each in results.scaling.items()},
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
    for kind, latencies in results.latencies.items():
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
