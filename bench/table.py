"""The README's speed table, made from result files: python -m bench.table [--check]

The newest file of each kind in bench/results is shown between two markers of README.md; nothing there is typed.
--check exits with 1 if the README does not say what the files say.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import RESULTS, ROOT, load, unproven
from esamp_core.base.files import read_text, write_text

START = "<!-- bench: made by `make bench-table` from bench/results; do not edit -->"
END = "<!-- /bench -->"
KINDS = ("kernels", "decode", "cpu")


def newest(folder: Path = RESULTS) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The latest result of each kind, by date, then by name.  Dry runs are refused."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        body = load(path)
        if body["dry"]:
            raise SystemExit(f"{path} is a dry run; it does not belong into {folder.name}")
        kind = body["kind"]
        if kind not in found or body["date"] >= found[kind][1]["date"]:
            found[kind] = (path, body)
    return found


def number(value: Any, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def versions(body: dict[str, Any]) -> str:
    named = ", ".join(f"{name} {version}" for name, version in body["versions"].items())
    machine = body["machine"]
    where = machine.get("gpu") if body["kind"] != "cpu" else f"{machine['cpu']}, {machine['threads']} thread(s)"
    driver = f", driver {machine['driver']}" if body["kind"] != "cpu" else ""
    doubt = "" if (why := unproven(body)) is None else f"**Unproven**: {why}. "
    return f"{doubt}`{body['command']}` on {where}{driver}; {named}; commit {body['commit']}; {body['date']}."


def cpu_table(body: dict[str, Any]) -> list[str]:
    lines = ["| logits | filters | candidates | ms | transformers, ms | ratio |", "|---|---|---|---|---|---|"]
    rows = {(r["kind"], r["setting"], r["op"]): r for r in body["cases"]}
    for (kind, setting, op), row in rows.items():
        if op == "explore":
            theirs = rows[kind, setting, "transformers"]
            numbers = f"{number(row['milliseconds'], 0)} | {number(theirs['milliseconds'], 0)} | {number(row['ratio'])}"
            lines.append(f"| {kind} | {setting} | {row['candidates']} | {numbers} |")
    return lines


PEERS = {
    "explore": "with exploration",
    "vanilla": "without",
    "peer flashinfer": "FlashInfer",
    "peer vllm": "vLLM's Triton sampler",
    "peer transformers": "transformers",
}


def step_table(body: dict[str, Any]) -> list[str]:
    """Whole sampling steps in µs, ours and the peers', for the cases in which peers ran."""
    lines = [f"| whole step, µs | {' | '.join(PEERS.values())} |", "|---" * (1 + len(PEERS)) + "|"]
    times = {(row["case"], row["op"]): row.get("microseconds") for row in body["cases"]}
    for case in dict.fromkeys(row["case"] for row in body["cases"]):
        if any((case, op) in times for op in PEERS if op.startswith("peer")):
            lines.append(f"| {case} | {' | '.join(number(times.get((case, op)), 0) for op in PEERS)} |")
    return lines if len(lines) > 2 else []


def kernel_table(body: dict[str, Any]) -> list[str]:
    lines = [*step_table(body), ""] if step_table(body) else []
    lines += ["| case | op | µs | GB/s | x floor | target, µs |", "|---|---|---|---|---|---|"]
    first = list(dict.fromkeys(row["case"] for row in body["cases"]))[:3]
    for row in body["cases"]:
        if row["case"] in first and row.get("of_floor") is not None:
            cells = [number(row["microseconds"], 1), number(row["gb_per_s"], 0), number(row["of_floor"])]
            lines.append(f"| {row['case']} | {row['op']} | {' | '.join(cells)} | {number(row.get('target'), 1)} |")
    return lines


def decode_table(body: dict[str, Any]) -> list[str]:
    lines = [
        "| model, prompts x samples | | ms/step | tokens/s | speed on / this | target |",
        "|---|---|---|---|---|---|",
    ]
    targets = {row["case"]: row.get("target") for row in body["cases"] if row["op"] == "on"}
    ratios = {row["case"]: row.get("ratio") for row in body["cases"] if row["op"] == "on"}
    for row in body["cases"]:
        if row.get("milliseconds") is not None:
            off = row["op"] == "off"
            ratio = (
                ratios[row["case"]] if off else row.get("ratio") if row["op"] in ("transformers", "distinct") else None
            )
            cells = [number(row["milliseconds"], 3), number(row["tokens_per_s"], 0), number(ratio, 3)]
            target = number(targets[row["case"]], 3) if off else ""
            lines.append(f"| {row['case']} | {row['op']} | {' | '.join(cells)} | {target} |")
    return lines


TABLES = {"cpu": cpu_table, "kernels": kernel_table, "decode": decode_table}
TITLES = {
    "kernels": "Kernels on a GPU",
    "decode": "Decoding on a GPU",
    "cpu": "A whole sampling step on the CPU, 16 rows of 152,064 logits, beside transformers' warpers and multinomial",
}


def markdown(results: dict[str, tuple[Path, dict[str, Any]]]) -> str:
    parts = []
    for kind in KINDS:
        if kind not in results:
            parts.append(f"{TITLES[kind]}: not run yet.")
            continue
        path, body = results[kind]
        parts.append(f"{TITLES[kind]} ([{path.name}](bench/results/{path.name})):")
        parts.append("\n".join(TABLES[kind](body)))
        parts.append(versions(body))
    return "\n\n".join(parts)


def replaced(text: str, table: str) -> str:
    """The text with the table between the markers.  Raises SystemExit if there are none."""
    if text.count(START) != 1 or text.count(END) != 1:
        raise SystemExit(f"README.md must have {START!r} and {END!r} once each")
    before, rest = text.split(START)
    return f"{before}{START}\n\n{table}\n\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if something would change")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    a = parser.parse_args(arguments)
    old = read_text(a.readme, "--readme")
    new = replaced(old, markdown(newest()))
    if a.check:
        if new != old:
            print("README.md's speed table is not what bench/results says; run `make bench-table`")
        return int(new != old)
    write_text(a.readme, new, "--readme")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
