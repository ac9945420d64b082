"""Regression guard: python -m bench.compare old.json new.json [--threshold 0.1]

Prints new / old of every time that both files have, and exits with 1 if one grew by more than the threshold and by more
than its spread.  For CPU results it is the ratio to transformers that is compared, since milliseconds of a shared
machine say nothing.  Files of different kinds or machines are not comparable: exit 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.results import load


class Line(NamedTuple):
    name: str
    old: float
    new: float
    noise: float  # relative

    @property
    def ratio(self) -> float:
        return self.new / self.old


def costs(body: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """What should not grow, by case: (value, relative spread).  Peers are not ours to guard."""
    field = {"kernels": "microseconds", "decode": "milliseconds", "cpu": "ratio"}[body["kind"]]
    return {
        row["name"]: (float(row[field]), float(row.get("spread") or 0.0))
        for row in body["cases"]
        if row.get(field) is not None and not str(row.get("op", "")).startswith(("peer", "transformers"))
    }


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Line]:
    before, after = costs(old), costs(new)
    return [
        Line(name, value, after[name][0], max(noise, after[name][1]))
        for name, (value, noise) in before.items()
        if name in after
    ]


def device_of(body: dict[str, Any]) -> str:
    machine = body["machine"]
    return str(machine.get("gpu") if body["kind"] != "cpu" else machine.get("cpu"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.1, help="how much a time may grow, relative")
    a = parser.parse_args(arguments)
    old, new = load(a.old), load(a.new)
    for path, body in ((a.old, old), (a.new, new)):
        if body["dry"]:
            print(f"{path} is a dry run: it holds no times")
            return 2
    if (old["kind"], device_of(old)) != (new["kind"], device_of(new)):
        print(f"not comparable: {old['kind']} on {device_of(old)} and {new['kind']} on {device_of(new)}")
        return 2
    lines = compare(old, new)
    if not lines:
        print("the files have no case in common")
        return 2
    slower = [line for line in lines if line.ratio > 1 + max(a.threshold, line.noise)]
    for line in sorted(lines, key=lambda line: -line.ratio):
        mark = "SLOWER" if line in slower else ""
        print(f"{line.ratio:7.3f}  {line.old:10.3f} -> {line.new:10.3f}  {line.name}  {mark}".rstrip())
    print(f"{len(slower)} of {len(lines)} cases grew by more than {a.threshold:.0%}")
    return 1 if slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
