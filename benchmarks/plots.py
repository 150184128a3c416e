"""The figures as pictures."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from benchmarks.report import BATCHES, LIMIT, OURS, QUEUES, Samples

COLOURS = {
    OURS: "#0b6e4f",
    BATCHES: "#6bbf59",
    QUEUES: "#c1440e",
    "memory streams": "#6c757d",
    "Airflow": "#e9a820",
    "reactivex": "#8e6c9e",
    LIMIT: "#222222",
}
PANELS = [
    ("woken", "asyncio"),
    ("woken", "uvloop"),
    ("woken", "trio"),
    ("burst", "asyncio"),
    ("burst", "uvloop"),
    ("burst", "trio"),
]
TITLES = {"woken": "each event wakes all", "burst": "bursts of 64"}


def draw(samples: Samples, directory: Path) -> None:
    """Write ``benchmarks.svg``: CPU time per delivery over the number of subscribers, a panel per kind of work and loop."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same figures give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(12, 7), sharex=True, sharey="row")
    for panel, (work, loop) in zip(panels.flat, PANELS, strict=True):
        for name, colour in COLOURS.items():
            found = {int(case[3]): figures for case, figures in samples.items() if case[:3] == (work, loop, name)}
            # With one subscriber or ten, the source's own pauses are most of what is measured.
            sizes = sorted(size for size in found if size >= 100)
            if sizes:
                middle = [median(found[size]) for size in sizes]
                panel.plot(
                    sizes, middle, color=colour, label=name, marker="o", markersize=3, linestyle="--" if name == LIMIT else "-"
                )
                least, most = [min(found[size]) for size in sizes], [max(found[size]) for size in sizes]
                panel.fill_between(sizes, least, most, color=colour, alpha=0.15)
        panel.set(xscale="log", yscale="log", title=f"{loop}: {TITLES[work]}")
        panel.grid(visible=True, which="both", alpha=0.2)
    for row in panels:
        row[0].set_ylabel("CPU time per delivery (microseconds)")
    for panel in panels[1]:
        panel.set_xlabel("subscribers")
    labels = {label: line for panel in panels.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend([*labels.values()], [*labels], loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(directory / "benchmarks.svg", metadata={"Date": None})
