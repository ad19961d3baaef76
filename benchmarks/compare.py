"""vitmed's training step beside another's, in turn on the same machine: one table of medians, ratios and peak memory.

    python -m benchmarks.compare --peer="path/to/python path/to/step.py" --patches=28,14,7,4 --rounds=3

The peer is a command that takes --rank, --image, --patches, --batch and --seconds, and ends with a line of JSON whose `steps` has for each
patch size its `ms`. Every patch size of either side is a process of its own, and their order changes from round to round: the ratio is that
of the two medians over rounds, the memory the largest that a process took.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peer", required=True, help="the other side's command")
    parser.add_argument("--rank", type=int, default=2, choices=(2, 3))
    parser.add_argument("--image", type=int, default=28)
    parser.add_argument("--patches", default="28,14,7,4,2,1")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args(argv)


def measured(command: Sequence[str], patch: str) -> dict[str, Any]:
    """What a command says of a patch size, and the peak memory of its process in MB. SystemExit where it fails."""
    process = subprocess.Popen([*command, f"--patches={patch}"], stdout=subprocess.PIPE, text=True)
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"benchmarks.compare: {shlex.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return json.loads(said.splitlines()[-1])["steps"][patch] | {"mb": usage.ru_maxrss // 1024}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both sides in turn and print the table."""
    args = arguments(argv)
    common = [f"--{name}={getattr(args, name)}" for name in ("rank", "image", "batch", "seconds")]
    sides = {"vitmed": [sys.executable, "-m", "benchmarks.step", *common], "peer": [*shlex.split(args.peer), *common]}
    print("| patch | vitmed ms | peer ms | peer / vitmed | share of the matrix rate | vitmed MB | peer MB |\n|---|---|---|---|---|---|---|")
    for patch in args.patches.split(","):
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for number in range(args.rounds):
            for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
                found[name].append(measured(sides[name], patch))
        ours, theirs = (statistics.median(one["ms"] for one in found[name]) for name in sides)
        memory = [max(one["mb"] for one in found[name]) for name in sides]
        share = statistics.median(one["share"] for one in found["vitmed"])
        print(f"| {patch} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} | {share:.0%} | {memory[0]} | {memory[1]} |", flush=True)


if __name__ == "__main__":
    main()
