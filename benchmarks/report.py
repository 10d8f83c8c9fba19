"""Shows what `benchmarks.run` wrote, as Markdown and as a plot.

    python -m benchmarks.report [FILE ...] [--out FOLDER] [--plot FILE.png]

Without files: all that hold records in FOLDER (benchmarks/results), where `benchmarks.run --out` put them.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import records
from .records import OURS, Measured, Record

#: Titles of columns, and how `line` sets them.
_COLUMNS = {
    "shape": "<36",
    "pass": "<5",
    "impl": "<11",
    "us": ">9",
    "floor": ">9",
    "floor/us": ">10",
    "host us": ">9",
    "launches": ">10",
    "peak MB": ">9",
    "error": ">9",
    "method": ">10",
}


def ceilings(measured: Measured) -> str:
    """What the machine did at most, as a line."""
    clock = measured["sm_clock_mhz"]
    return f"copy {measured['copy_gb_s']:.0f} GB/s, matrix product {number(measured['matmul_tflops'])} TFLOP/s" + (
        "" if clock is None else f", SM clock {clock:.0f} MHz"
    )


def number(value: float) -> str:
    """Three significant digits, all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def cells(record: Record) -> dict[str, str]:
    """A record's figures by column of `_COLUMNS`."""
    return {
        "shape": record["shape"],
        "pass": record["pass"],
        "impl": record["impl"],
        "us": number(record["us"]),
        "floor": number(record["floor_us"]),
        "floor/us": f"{record['floor_us'] / record['us']:.0%}",
        "host us": number(record["host_us"]),
        "launches": "" if record["launches"] is None else str(record["launches"]),
        "peak MB": number(record["peak_bytes"] / 1e6),
        "error": f"{record['error']:.1e}",
        "method": record["method"],
    }


def _padded(texts: Iterable[str]) -> str:
    return "".join(format(text, width) for text, width in zip(texts, _COLUMNS.values(), strict=True))


HEADER = _padded(_COLUMNS)


def line(record: Record) -> str:
    """A record as a line under `HEADER`."""
    return _padded(cells(record).values())


def grouped(found: Iterable[Record], *fields: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records by the values of `fields`, in the order in which those come."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in found:
        groups.setdefault(tuple(record[field] for field in fields), []).append(record)
    return groups


def markdown(found: Sequence[Record]) -> str:
    """A table for each op, a row for each record; a peer's has its time over ours."""
    parts = []
    for (gpu, version, commit, *_), run in grouped(found, "gpu", "version", "commit", "copy_gb_s").items():
        parts.append(f"## {gpu}\n\noxiscan {version} ({commit or 'commit unknown'}); {ceilings(run[0])}. Times in us.")
        for (op, dtype), rows in grouped(run, "op", "dtype").items():
            table = [[*_COLUMNS, "times ours"]]
            table.append(["---:" if width.startswith(">") else "---" for width in _COLUMNS.values()] + ["---:"])
            for same in grouped(rows, "shape", "pass").values():
                ours = next((r["us"] for r in same if r["impl"] == OURS), None)
                for record in same:
                    ratio = "" if ours is None or record["impl"] == OURS else f"{record['us'] / ours:.2f}"
                    table.append([*cells(record).values(), ratio])
            parts.append(f"### {op}, {dtype}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in table))
    return "\n\n".join(parts) + "\n"


def plot(found: Sequence[Record], path: Path) -> None:
    """Times on a logarithmic axis, a row for each case and pass: floor, ours and peers; a panel for each GPU and op."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panels = grouped(found, "gpu", "dtype", "op")
    rows = {key: grouped(panel, "shape", "pass") for key, panel in panels.items()}
    peers = sorted({record["impl"] for record in found} - {OURS})
    styles = {OURS: ("#0072b2", "o")} | dict(
        zip(peers, [("#d55e00", "s"), ("#009e73", "D"), ("#cc79a7", "^"), ("#e69f00", "v")], strict=False)
    )
    heights = [len(groups) + 2.5 for groups in rows.values()]
    figure, axes = plt.subplots(
        len(panels),
        figsize=(10, 0.27 * sum(heights) + 0.8),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, ((gpu, dtype, op), groups) in zip(axes[:, 0], rows.items(), strict=True):
        for y, same in enumerate(groups.values()):
            times = [record["us"] for record in same]
            floor = same[0]["floor_us"]
            axis.plot([min(floor, *times), max(times)], [y, y], color="#d0d0d0", linewidth=1.5, zorder=1)
            axis.plot(
                floor, y, color="black", marker="|", markersize=11, markeredgewidth=2, linestyle="", label="floor"
            )
            for record in same:
                color, marker = styles[record["impl"]]
                ours = record["impl"] == OURS
                point = {"color": color, "marker": marker, "markersize": 6, "linestyle": "", "zorder": 3 + ours}
                axis.plot(record["us"], y, label=record["impl"], **point)
                if ours:
                    share = f"{number(record['us'])} us, {record['floor_us'] / record['us']:.0%}"
                    axis.text(1.01, y, share, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
        axis.set_yticks(range(len(groups)), [f"{shape}  {which}" for shape, which in groups], fontsize=8)
        axis.set_ylim(len(groups) - 0.4, -0.6)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="x", color="#eeeeee")
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.set_title(f"{op}, {dtype}, {gpu}", fontsize=10, loc="left")
        axis.text(1.01, 1.0, f"{OURS}, floor/time", transform=axis.transAxes, va="bottom", fontsize=8)
    axes[-1, 0].set_xlabel("microseconds a call")
    handles = {
        label: handle for axis in axes[:, 0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    order = [name for name in ("floor", *styles) if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside lower right", ncols=len(order), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def load(files: Sequence[Path], folder: Path) -> list[Record]:
    """The records of files; without any, of all in `folder` that hold records."""
    if files:
        return [record for path in files for record in records.read(path)]
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found += records.read(path)
        except ValueError:  # figures of another benchmark
            continue
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="what benchmarks.run wrote")
    parser.add_argument(
        "--out", type=Path, default=records.FOLDER, metavar="FOLDER", help="where to look without files"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the times there")
    options = parser.parse_args(argv)
    try:
        found = load(options.files, options.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not found:
        parser.error(f"got no records in {options.files or options.out}; allowed: what benchmarks.run wrote")
    print(markdown(found), end="")
    if options.plot:
        plot(found, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
