"""Pictures of result files: python -m bench.plot kernels.json decode.json ... [--out FOLDER]

roofline.png   every op's achieved rate over its operations per byte, under the measured roofs
scaling.png    microseconds of the whole step over R, its peers beside it, over V and S
overhead.png   decode speed with exploration relative to without, over the number of rows
cpu.png        the CPU step relative to transformers'
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.results import load, output_folder

Rows = list[dict[str, Any]]


def base_name(rows: Rows) -> dict[str, Any]:
    """The first sampling case: what the other axes vary around."""
    return next(row for row in rows if "K" in row)


def roofline(body: dict[str, Any], axes: Any) -> None:
    rows = [r for r in body["cases"] if r.get("gb_per_s") and r.get("flops")]
    bandwidth, rate = body["floors"]["bytes_per_s"], body["floors"]["bf16_flops"]
    for op in dict.fromkeys(r["op"] for r in rows):
        mine = [r for r in rows if r["op"] == op]
        intensity = [r["flops"] / r["bytes"] for r in mine]
        axes.scatter(intensity, [r["flops"] / r["microseconds"] * 1e6 for r in mine], s=12, label=op)
    xs = [10 ** (k / 4) for k in range(-12, 13)]
    axes.plot(xs, [min(x * bandwidth, rate) for x in xs], color="black", label="measured roof")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second")
    axes.legend(fontsize=7)


def scaling(body: dict[str, Any], axis: str, axes: Any) -> None:
    rows = body["cases"]
    ops = ("distiller_forward", "distiller_step_") if axis == "S" else ("explore", "vanilla", "select_candidates")
    if axis == "R":
        ops += ("peer flashinfer", "peer vllm", "peer transformers")
    base = base_name(rows)
    fixed = {"R", "V", "K", "dtype", "kind", "H"} - {axis, "H"} if axis != "S" else set()
    for op in ops:
        mine = [r for r in rows if r["op"] == op and r.get("microseconds") and axis in r]
        if axis == "S":
            mine = [r for r in mine if r["H"] == base["H"]]
        mine = sorted((r for r in mine if all(r.get(f) == base[f] for f in fixed)), key=lambda r: r[axis])
        if mine:
            axes.loglog([r[axis] for r in mine], [r["microseconds"] for r in mine], marker="o", label=op)
            axes.legend(fontsize=7)
    axes.set(xlabel=axis, ylabel="microseconds")


def overhead(body: dict[str, Any], axes: Any) -> None:
    rows = [r for r in body["cases"] if r["op"] == "on" and r.get("ratio")]
    for model in dict.fromkeys(r["model"] for r in rows):
        mine = sorted((r for r in rows if r["model"] == model), key=lambda r: r["R"])
        axes.plot([r["R"] for r in mine], [r["ratio"] for r in mine], marker="o", label=model)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="rows (prompts x samples)", ylabel="speed, exploration on / off")
    axes.legend(fontsize=7)


def cpu(body: dict[str, Any], axes: Any) -> None:
    rows = [r for r in body["cases"] if r["op"] == "explore" and r.get("ratio")]
    axes.barh([f"{r['kind']}, {r['setting']}" for r in rows], [r["ratio"] for r in rows])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="time relative to transformers' warpers")


def draw(body: dict[str, Any], folder: Path) -> list[Path]:
    """Write the pictures of one result; nothing for a dry run, which has no times."""
    if body["dry"]:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plans: dict[str, list[tuple[str, list[Callable[[Any], None]]]]] = {
        "kernels": [
            ("roofline", [lambda axes: roofline(body, axes)]),
            ("scaling", [lambda axes, a=a: scaling(body, a, axes) for a in ("R", "V", "S")]),  # type: ignore[misc]
        ],
        "decode": [("overhead", [lambda axes: overhead(body, axes)])],
        "cpu": [("cpu", [lambda axes: cpu(body, axes)])],
    }
    written = []
    for name, panels in plans.get(body["kind"], []):
        figure, grid = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), squeeze=False)
        for panel, axes in zip(panels, grid[0], strict=True):
            panel(axes)
        figure.suptitle(f"{body['machine'].get('gpu') or body['machine']['cpu']}, {body['date']}", fontsize=8)
        figure.tight_layout()
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=130)
        pyplot.close(figure)
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="folder; default ESAMP_BENCH_OUT or bench/out")
    a = parser.parse_args(arguments)
    folder = a.out or output_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for path in a.results:
        for picture in draw(load(path), folder):
            print(picture)


if __name__ == "__main__":
    main()
