"""The long version of three tests: a run killed two hundred times while it saves, a thousand damaged files, and a
thousand random loads against an oracle of their own.

All use the functions that the suite uses, in processes of their own, so that a crash is counted and not fatal. Prints
a table; the exit code is 1 when anything happened that must never happen.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
BATCH = 100
KILLS_AT_ONCE = 20


def environment() -> dict[str, str]:
    """This process's, with the repository on the path and libraries' warnings off."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}


def run_kills(kills: int, seed: int, saver: str, progress: tqdm[None]) -> tuple[list[list[str]], list[str]]:
    """Kill a saving run ``kills`` times.

    Returns:
        Rows of the table, and what went wrong.
    """
    total: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, kills, KILLS_AT_ONCE):
            count = min(KILLS_AT_ONCE, kills - start)
            command = [
                sys.executable,
                str(ROOT / "tests" / "save_kill.py"),
                str(count),
                str(seed + start),
                folder,
                saver,
            ]
            done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
            if done.returncode:
                wrong.append(f"kills {start} to {start + count - 1}: {done.stderr.strip().splitlines()[-1:]}")
            else:
                total.update(json.loads(done.stdout))
            progress.update(count)
    rows = [
        [f"killed while saving ({saver})", str(total["kills"])],
        ["  of them while a file was half written", str(total["while_writing"])],
        ["  saves that later runs found whole", str(total["saves"])],
        ["  runs that found anything else", str(len(wrong))],
    ]
    return rows, wrong


def run_files(files: int, seed: int, progress: tqdm[None]) -> tuple[list[list[str]], list[str]]:
    """Read ``files`` damaged, wrong and hostile files.

    Returns:
        Rows of the table, and what went wrong.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        first, end = seed, seed + files
        while first < end:
            command = [
                sys.executable,
                str(ROOT / "tests" / "corruption.py"),
                str(first),
                str(min(BATCH, end - first)),
                folder,
            ]
            last = first - 1
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
            ) as process:
                for line in process.stdout or ():
                    found = json.loads(line)
                    if "violation" in found:
                        wrong.append(f"file {found['seed']}: {found['violation']}")
                    if len(found) > 1:
                        group = found.get("kind", "").partition(":")[0]
                        group = group if group in ("wrong", "hostile") else f"damaged {found.get('form', '?')}"
                        outcomes[f"{group}: {found.get('result', 'violation')}"] += 1
                        last = found["seed"]
                        progress.update()
                errors = process.stderr.read() if process.stderr else ""
            if process.returncode:
                # The file after the last judged one took the process with it.
                last += 1
                wrong.append(f"file {last}: exit code {process.returncode} {errors.strip().splitlines()[-1:]}")
                outcomes["crash"] += 1
                progress.update()
            first = last + 1
    rows = [["corrupted files", str(sum(outcomes.values()))]]
    rows += [[f"  {name}", str(count)] for name, count in sorted(outcomes.items())]
    rows.append(["  crashes, code that ran, other exceptions, wrong values", str(len(wrong))])
    return rows, wrong


def run_loads(loads: int, seed: int, progress: tqdm[None]) -> tuple[list[list[str]], list[str]]:
    """Load ``loads`` random files into random models, and compare every tensor with what the oracle says.

    Returns:
        Rows of the table, and what differed.
    """
    kinds: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    command = [sys.executable, str(ROOT / "tests" / "row_moves.py"), str(seed), str(loads)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
    ) as process:
        for line in process.stdout or ():
            found = json.loads(line)
            kinds[found.get("kind", "no result")] += 1
            if "violation" in found:
                wrong.append(f"load {found['seed']}: {found['violation']}")
            progress.update()
    if process.returncode or sum(kinds.values()) != loads:
        wrong.append(f"{sum(kinds.values())} of {loads} loads were judged, exit code {process.returncode}")
    rows = [["random loads", str(sum(kinds.values()))]]
    rows += [[f"  {name}", str(count)] for name, count in sorted(kinds.items())]
    return [*rows, ["  tensors, files or messages other than the oracle's", str(len(wrong))]], wrong


def main() -> int:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="kills during saving (default 200)")
    parser.add_argument("--files", type=int, default=1000, help="corrupted files (default 1000)")
    parser.add_argument("--loads", type=int, default=1000, help="random loads (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="first seed of each (default 0)")
    parser.add_argument(
        "--saver",
        default="files",
        choices=("files", "checkpointer"),
        help="what saves: the file functions or the checkpointer",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the table as JSON")
    args = parser.parse_args()
    start = time.monotonic()
    with tqdm(total=args.kills, desc="kills", unit="kill") as progress:
        rows, wrong = run_kills(args.kills, args.seed, args.saver, progress)
    with tqdm(total=args.files, desc="files", unit="file") as progress:
        more_rows, more_wrong = run_files(args.files, args.seed, progress)
    with tqdm(total=args.loads, desc="loads", unit="load") as progress:
        rows_of_loads, wrong_loads = run_loads(args.loads, args.seed, progress)
    rows += [*more_rows, *rows_of_loads, ["seconds", f"{time.monotonic() - start:.0f}"]]
    wrong += [*more_wrong, *wrong_loads]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value:>7}")
    for line in wrong:
        print(f"WRONG  {line}")
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows, "wrong": wrong}, indent=1), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
