"""Record what small configurations compute on a checkout, and compare two checkouts bit by bit. See README.md.

golden.py record --tree DIR OUT.json
golden.py compare OLD_TREE NEW_TREE
golden.py diff OLD.json NEW.json
golden.py list
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cases import Case, cases
from fingerprint import Record, differences, fingerprint, folder_digest
from processes import HERE, Worker

SHOWN = 4  # differences of one case in the table
FAILED = "failed"  # key of a record: why there is no other


def run_case(worker: Worker, case: Case, work: Path) -> tuple[Record, float]:
    """Run a case on one tree, in the folder that every tree uses for it: its record, and its seconds."""
    folder = case_folder(work, case)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seconds = 0.0
    for request in requests(case, work):
        if request["do"] == "cut off":
            if reason := worker.cut_off(request | {"do": "simulate"}, case):
                return {FAILED: reason}, seconds
            continue
        told = worker.ask(request)
        seconds += told["seconds"]
        if told["error"]:
            return {FAILED: told["error"]}, seconds
    return fingerprint(folder, costs_only=bool(case.loose)), seconds


def requests(case: Case, work: Path) -> list[dict[str, Any]]:
    """What a worker is asked to do for a case, in order."""
    folder = case_folder(work, case)

    def filled(text: str) -> str:
        return text.replace("$INPUTS", str(work / "inputs")).replace("$CASE", str(folder))

    settings = [filled(setting) for setting in case.settings]
    run = {"do": "simulate", "toml": filled(case.toml), "settings": settings, "out": str(folder / "run")}
    if case.way == "twice":
        return [run, run | {"out": str(folder / "again"), "settings": [*settings, "run.seed=9"]}]
    if case.way == "run":
        return [run]
    return [run | {"do": "cut off"}, {"do": "resume", "out": str(folder / "run")}]


def case_folder(work: Path, case: Case) -> Path:
    """Where a case runs."""
    return work / "case" / case.name.replace("/", "-")


def record(tree: Path, out: Path, chosen: list[Case], work: Path) -> int:
    """Write the records of one tree. Returns the exit code: 1 if a case failed."""
    records: dict[str, Record] = {}
    with Worker(tree, work, 0) as worker:
        for case in chosen:
            records[case.name], seconds = run_case(worker, case, work)
            print(f"{case.name:<36} {seconds:6.1f} s  {records[case.name].get(FAILED, '')}", flush=True)
    told = {"tree": str(tree.resolve()), "inputs": folder_digest(work / "inputs"), "cases": records}
    out.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(any(FAILED in found for found in records.values()))


def compare(old: Path, new: Path, chosen: list[Case], work: Path) -> int:
    """Run every case on both trees, one after the other, and print a table. Returns the exit code: 1 if any differs."""
    wrong, started = 0, time.monotonic()
    print(f"{'case':<36} {'':<9} {'old s':>6} {'new s':>6}  CPU seconds; what differs (old → new)", flush=True)
    with Worker(old, work, 0) as first, Worker(new, work, 1) as second:
        for case in chosen:
            one, one_seconds = run_case(first, case, work)
            kept = move(case_folder(work, case), work / "old")
            other, other_seconds = run_case(second, case, work)
            lines = differences(one, other, kept, case_folder(work, case))
            word = verdict(one, other, lines)
            wrong += word != "equal"
            print(
                f"{case.name:<36} {word:<9} {one_seconds:6.1f} {other_seconds:6.1f}  {brief(lines, one, case)}",
                flush=True,
            )
            settle(kept, case_folder(work, case), keep=word != "equal")
    minutes = (time.monotonic() - started) / 60
    print(f"{len(chosen) - wrong} of {len(chosen)} equal, {minutes:.1f} minutes", flush=True)
    return int(wrong > 0)


def verdict(old: Record, new: Record, lines: list[str]) -> str:
    """One word on a case. Two failures are no agreement."""
    if FAILED in old or FAILED in new:
        return "FAILED"
    return "DIFFERENT" if lines else "equal"


def brief(lines: list[str], old: Record, case: Case) -> str:
    """The first differences, or the failure that both trees have in common."""
    if not lines:
        return str(old.get(FAILED, f"(cost only: {case.loose})" if case.loose else ""))
    more = f" (and {len(lines) - SHOWN} more)" if len(lines) > SHOWN else ""
    return "; ".join(lines[:SHOWN]) + more


def move(folder: Path, to: Path) -> Path:
    """Put a case's folder away, so that the next tree can use its place."""
    target = to / folder.name
    shutil.rmtree(target, ignore_errors=True)
    to.mkdir(exist_ok=True)
    return folder.rename(target)


def settle(old: Path, new: Path, keep: bool) -> None:
    """Remove the two folders of a case, or keep them beside each other (``old/``, ``new/``) to be looked into."""
    if keep:
        move(new, old.parent.with_name("new"))
    else:
        shutil.rmtree(old)
        shutil.rmtree(new)


def diff(old: Path, new: Path) -> int:
    """Compare two files of ``record``. Returns the exit code: 1 if they differ."""
    one, other = (json.loads(path.read_text(encoding="utf-8")) for path in (old, new))
    if one["inputs"] != other["inputs"]:
        print("the inputs differ: the records come from different environments")
        return 1
    wrong = 0
    for name in sorted(one["cases"].keys() | other["cases"].keys()):
        before, after = one["cases"].get(name, {FAILED: "not run"}), other["cases"].get(name, {FAILED: "not run"})
        if (lines := differences(before, after, None, None)) or FAILED in before:
            wrong += 1
            print(f"{name:<36} {'; '.join(lines[:SHOWN]) or before[FAILED]}")
    print(f"{len(one['cases'].keys() | other['cases'].keys()) - wrong} equal, {wrong} not")
    return int(wrong > 0)


@contextmanager
def working_folder(given: Path | None) -> Iterator[Path]:
    """The given folder, or a temporary one in memory, with the inputs in it; only one process at a time may use it."""
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # runs sync every line of their ledgers to the disk
    work = (given or Path(tempfile.mkdtemp(prefix="golden-", dir=fast))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in ("inputs", "case", "old", "new", "cache-0", "cache-1"):
            shutil.rmtree(work / name, ignore_errors=True)
        subprocess.run([sys.executable, str(HERE / "inputs.py"), str(work / "inputs")], check=True)
        yield work


def chosen_cases(told: argparse.Namespace) -> list[Case]:
    """The cases that are asked for: without any wish, all but the extra ones. Ends the program for an unknown name."""
    only, substring, (part, parts) = told.only, told.substring, told.part
    known = {case.name: case for case in cases()}
    if odd := [name for name in only if name not in known]:
        raise SystemExit(f"no case is called {odd[0]!r}; see golden.py list --all")
    if only or substring:
        chosen = [case for name, case in known.items() if (not only or name in only) and substring in name]
    else:
        chosen = [case for case in known.values() if told.all or not case.extra]
    return chosen[part - 1 :: parts]


def part_of(text: str) -> tuple[int, int]:
    """``"1/2"`` as (1, 2). Raises ValueError for anything else."""
    part, parts = (int(number) for number in text.split("/"))
    if not 1 <= part <= parts:
        raise ValueError(text)
    return part, parts


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="write the records of one tree")
    recording.add_argument("--tree", type=Path, required=True)
    recording.add_argument("out", type=Path, metavar="OUT.json")
    comparing = commands.add_parser("compare", help="run both trees and print what differs")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    diffing = commands.add_parser("diff", help="compare two files of record")
    diffing.add_argument("old", type=Path)
    diffing.add_argument("new", type=Path)
    listing = commands.add_parser("list", help="print the names of the cases")
    for command in (recording, comparing, listing):
        command.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these cases")
        command.add_argument(
            "-k", dest="substring", default="", metavar="SUBSTRING", help="cases whose name holds this"
        )
        command.add_argument("--all", action="store_true", help="also those that are near others, or slow")
        command.add_argument(
            "--part", type=part_of, default=(1, 1), metavar="I/N", help="every N-th case, from the I-th"
        )
    for command in (recording, comparing):
        command.add_argument("--work", type=Path, help="working folder (default: a temporary one)")
    return parser.parse_args()


def main() -> int:
    """Do what the command line says. Returns the exit code."""
    told = arguments()
    if told.command == "diff":
        return diff(told.old, told.new)
    chosen = chosen_cases(told)
    if told.command == "list":
        print("\n".join(case.name for case in chosen))
        return 0
    with working_folder(told.work) as work:
        if told.command == "record":
            code = record(told.tree, told.out, chosen, work)
        else:
            code = compare(told.old, told.new, chosen, work)
    if code:
        print(f"logs of the two trees, and the runs that differ (old/, new/), are in {work}")
    elif told.work is None:
        shutil.rmtree(work)
    return code


if __name__ == "__main__":
    sys.exit(main())
