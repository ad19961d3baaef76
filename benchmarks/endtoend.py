"""Whole training commands of vitmed and another library in turn: data, augmentation, validation, checkpoints and all.

    python -m benchmarks.endtoend --peer="path/to/python path/to/train.py --npz data/breastmnist.npz" --patches=28,14,7,4

The peer is a command that takes --patch, --epochs and --batch. Either side runs the recipe twice, for one epoch and for --epochs: the
difference is what an epoch takes once everything has started, and the longer run is the whole command from its start to its end. The last
column holds vitmed's epochs against the bare training step (benchmarks.step), which neither augments nor validates nor saves.
The longer run must last well beyond the start, or the difference is noise.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from benchmarks import compare
from vitmed import config as config_lib
from vitmed.data import sources


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endtoend", description=__doc__, formatter_class=about)
    parser.add_argument("--peer", required=True, help="the other side's command")
    parser.add_argument("--config", default="configs/vit2d.py", help="vitmed's recipe")
    parser.add_argument("--dataset", default="breastmnist")
    parser.add_argument("--patches", default="28,14,7,4")
    parser.add_argument("--epochs", default="20", help="of the longer run; one number, or one for each patch size")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args(argv)


def seconds(command: Sequence[str]) -> float:
    """How long a command takes; SystemExit where it fails."""
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"benchmarks.endtoend: {shlex.join(command)} ended with status {done.returncode}: {done.stderr[-500:]}")
    return time.perf_counter() - started


def vitmed_command(args: argparse.Namespace, patch: str, scratch: str) -> Callable[[int], list[str]]:
    """Epochs -> vitmed's command, into a new folder below `scratch` each time."""
    spec = f"--config={args.config}:dataset={args.dataset},patch={patch}"

    def command(epochs: int) -> list[str]:
        workdir = f"--workdir={tempfile.mkdtemp(dir=scratch)}/run"
        fields = [f"--config.train.epochs={epochs}", f"--config.train.batch_size={args.batch}", "--config.seeds=0"]
        return [sys.executable, "-m", "vitmed.main", spec, workdir, *fields]

    return command


def measure(sides: dict[str, Callable[[int], list[str]]], *, most: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds of the longer run, of it beyond one epoch) of each round, the sides in turn."""
    seconds(sides["vitmed"](1))  # compiled programs are in the cache from now on, as in use
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            short, whole = seconds(sides[name](1)), seconds(sides[name](most))
            found[name].append((whole, whole - short))
    return found


def peer_command(args: argparse.Namespace, patch: str) -> Callable[[int], list[str]]:
    """Epochs -> the peer's command."""
    return lambda epochs: [*shlex.split(args.peer), f"--patch={patch}", f"--epochs={epochs}", f"--batch={args.batch}"]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both sides in turn and print the table."""
    args = arguments(argv)
    spec = config_lib.load(f"{args.config}:dataset={args.dataset},patch=28,pretrained=")
    rank = spec.data.rank
    num_images = sources.describe(args.dataset, spec.data.size).num_examples["train"]
    patches = args.patches.split(",")
    epochs = [int(number) for number in args.epochs.split(",")] * (1 if "," in args.epochs else len(patches))
    step = [sys.executable, "-m", "benchmarks.step", f"--rank={rank}", f"--batch={args.batch}"]
    print("| patch | epochs | vitmed images/s | peer images/s | ratio | vitmed command s | peer command s | ratio | of the bare step |")
    print("|---|---|---|---|---|---|---|---|---|")
    for patch, most in zip(patches, epochs, strict=True):
        with tempfile.TemporaryDirectory() as scratch:
            sides = {"vitmed": vitmed_command(args, patch, scratch), "peer": peer_command(args, patch)}
            found = measure(sides, most=most, rounds=args.rounds)
        command, other = (statistics.median(whole for whole, _ in found[name]) for name in sides)
        images = num_images * (most - 1)
        ours, theirs = (images / statistics.median(beyond for _, beyond in found[name]) for name in sides)
        bare = 1e3 * args.batch / compare.measured(step, patch)["ms"]
        figures = (
            f"{ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} | {command:.0f} | {other:.0f} | {other / command:.2f} | {ours / bare:.0%}"
        )
        print(f"| {patch} | {most} | {figures} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except config_lib.InputError as error:
        raise SystemExit(f"benchmarks.endtoend: {error}") from error
