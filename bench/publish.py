"""Put measured results into the repository: bench/results/, its history, and the tables in docs/results.md.

    python -m bench.publish FOLDER ...     results of one machine and commit; several folders are parts of one run

Refused for results that are not of a commit, and where a contestant's rounds differ too much to be told apart from what
else the machine was doing: its 80th percentile above MOST_SPREAD times its 20th.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path

from . import report
from .machine import ROOT

MOST_SPREAD = 2.0
MOST_LOAD = 0.25  # of the CPUs, before a run that is to be published
MARKS = "<!-- results: made by bench/report.py -->", "<!-- end of results -->"
HISTORY = ["date", "commit", "machine", "layer", "dtype", "contestant", "ms", "ratio"]
KEYS = {"attention.json": ("layer", "dtype", "contestant"), "model.json": ("model", "way")}


class Refused(Exception):
    """Why results are not published."""


def refuse_a_busy_machine() -> None:
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load > MOST_LOAD * cpus:
        raise Refused(f"the machine is busy: a load of {load:.2f} on {cpus} CPUs; more than {MOST_LOAD * cpus:.2f}")


def merged(folders: list[Path], name: str) -> dict | None:
    """The results of that name in all folders, a later row in place of an earlier one; None where there are none."""
    found = [json.loads((folder / name).read_text()) for folder in folders if (folder / name).exists()]
    if not found:
        return None
    head = found[0]
    for other in found[1:]:
        for what in ("device", "machine", "commit"):
            if other.get(what) != head.get(what):
                raise Refused(f"{name}: results of one machine and commit only; {what} differs")
    rows = {tuple(row[key] for key in KEYS[name]): row for results in found for row in results["rows"]}
    return {**head, "rows": list(rows.values())}


def refuse(results: dict, name: str) -> None:
    """Unless they are of a commit, and steady."""
    commit = results.get("commit") or "none"
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise Refused(f"{name}: commit {commit}: only results of committed code are published")
    for row in results["rows"]:
        spread = row.get("first_token_spread") or row.get("p80_ms", 1) / row.get("p20_ms", 1)
        if spread > MOST_SPREAD:
            which = ", ".join(row[key] for key in KEYS[name])
            raise Refused(
                f"{name}: rounds differ by {spread:.1f} times ({which}), more than {MOST_SPREAD:g}: a busy machine"
            )


def folder_for(results: dict, published: Path) -> Path:
    """Named after the device; a number is added where that name is another machine's."""
    slug = re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
    number = 1
    while True:
        folder = published / (slug if number == 1 else f"{slug}-{number}")
        file = folder / "attention.json"
        if not file.exists():
            return folder
        machine = json.loads(file.read_text()).get("machine")
        if machine is None:
            print(f"{folder.name}: what stood there did not say which machine it was of; replaced")
        if machine in (None, results["machine"]):
            return folder
        number += 1


def publish(folders: list[Path], root: Path = ROOT) -> Path:
    """The folder under bench/results that now holds them. Nothing is written where they are refused."""
    found = {name: results for name in KEYS if (results := merged(folders, name))}
    if "attention.json" not in found:
        raise Refused(f"no attention.json in {', '.join(map(str, folders))}")
    for name, results in found.items():
        refuse(results, name)
    folder = folder_for(found["attention.json"], root / "bench/results")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, results in found.items():
        (folder / name).write_text(json.dumps(results, indent=1) + "\n")
    (folder / "attention.md").write_text(report.tables(folder, essential=False) + "\n")
    report.chart(folder)
    add_to_history(found["attention.json"], folder.name, root / "bench/results/history.csv")
    page = root / "docs/results.md"
    before, rest = page.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n{report.all_results(root)}\n{MARKS[1]}{after}")
    return folder


def add_to_history(results: dict, machine: str, file: Path) -> None:
    """One line a measured row."""
    new = not file.exists()
    with file.open("a", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        if new:
            writer.writerow(HISTORY)
        for row in results["rows"]:
            if "median_ms" in row:
                of_code = results["date"], results["commit"], machine
                ratio = row.get("ratio_to_sdpa")
                times = f"{row['median_ms']:.4g}", "" if ratio is None else f"{ratio:.4g}"
                writer.writerow([*of_code, row["layer"], row["dtype"], row["contestant"], *times])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    try:
        print(f"published in {publish(parser.parse_args(arguments).folders)}")
    except Refused as refused:
        print(f"not published: {refused}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
