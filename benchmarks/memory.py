"""How time and memory of a training step grow with tokens and with the model: a table, fitted exponents and a figure.

    python -m benchmarks.memory --out=docs/growth.svg

Every point is a process of its own (benchmarks.step at batch 1), whose peak memory counts whole: interpreter, libraries, compilation.
Exponents are slopes of least squares in log-log, from FEW tokens on: below, a step is the optimiser's and the process its libraries'.
"""

import argparse
import sys
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

from benchmarks import compare
from vitmed import cost
from vitmed.models import build

POINTS = ((2, 28), (2, 14), (2, 7), (2, 4), (2, 2), (3, 4), (2, 1), (3, 2), (3, 1))  # rank and patch size at 28 pixels
FEW = 197
MODELS = ("vit_ti", "vit_s", "vit_b")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__, formatter_class=about)
    parser.add_argument("--most", type=int, default=25_000, help="leave out points of more tokens")
    parser.add_argument("--model_patch", default="4", help="the 2D patch size at which models are compared")
    parser.add_argument("--out", default="", help="also draw a figure there")
    return parser.parse_args(argv)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y over log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def step(rank: int, patch: str, variant: str) -> dict[str, float]:
    """A step at batch 1 in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step", f"--rank={rank}", "--batch=1", f"--variant={variant}", "--seconds=2"]
    return compare.measured(command, patch)


def grown(args: argparse.Namespace) -> tuple[list[tuple[int, dict[str, float]]], list[tuple[int, dict[str, float]]]]:
    """(tokens, step) of ViT-Ti and (parameters, step) of the models, printed as they come."""
    by_tokens, by_size = [], []
    print("| model | rank, patch | tokens | parameters | ms | MB |\n|---|---|---|---|---|---|")

    def measured(rank: int, patch: int, variant: str) -> tuple[int, int, dict[str, float]]:
        sizes, architecture = {"image_size": (28,) * rank, "patch_size": (patch,) * rank}, build.VARIANTS[variant]
        widths = {"width": architecture.width, "depth": architecture.depth, "mlp_width": architecture.mlp_width}
        params = cost.num_params(**sizes, **widths, in_channels=3, num_classes=2)
        tokens, found = cost.num_tokens(**sizes), step(rank, str(patch), variant)
        print(f"| {variant} | {rank}D, {patch} | {tokens:,} | {params:,} | {found['ms']:,.1f} | {found['mb']:,} |", flush=True)
        return tokens, params, found

    for rank, patch in POINTS:
        if cost.num_tokens((28,) * rank, (patch,) * rank) <= args.most:
            tokens, _, found = measured(rank, patch, MODELS[0])
            by_tokens.append((tokens, found))
    for variant in MODELS:
        _, params, found = measured(2, int(args.model_patch), variant)
        by_size.append((params, found))
    return by_tokens, by_size


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and draw."""
    args = arguments(argv)
    by_tokens, by_size = grown(args)
    many = [(tokens, found) for tokens, found in by_tokens if tokens >= FEW]
    figure, axes = plt.subplots(2, 2, figsize=(8, 6), layout="constrained")
    for column, (points, fitted, label) in enumerate(((by_tokens, many, "tokens"), (by_size, by_size, "parameters"))):
        for row, (name, unit) in enumerate((("ms", "time of a step (ms)"), ("mb", "peak memory of the process (MB)"))):
            slope = exponent([x for x, _ in fitted], [found[name] for _, found in fitted]) if len(fitted) > 1 else float("nan")
            print(f"\n{unit} grows with {label} to the power of {slope:.2f}, from {fitted[0][0]:,} to {fitted[-1][0]:,}" if fitted else "")
            axis = axes[row][column]
            axis.loglog([x for x, _ in points], [found[name] for _, found in points], "o-", markersize=4)
            axis.set(xlabel=label, ylabel=unit, title=f"exponent {slope:.2f}")
            axis.grid(alpha=0.3)
    if args.out:
        figure.savefig(args.out)


if __name__ == "__main__":
    main()
