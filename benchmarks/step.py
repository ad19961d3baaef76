"""Milliseconds per training step of vitmed, per patch size; JSON last.

    python -m benchmarks.step --patches=28,14,7,4
    python -m benchmarks.step --rank=3 --batch=8 --patches=14,7,4

It is the program that trains: images as bytes on the device, gathered and normalised in the step, loss, gradient, AdamW, many steps a call.
Augmentation is off, so that it can stand beside a bare step of another library. A step is that of one run; with --seeds=3 three runs are
trained by the program and the time divided by them. `share` is the step's arithmetic (three times the forward pass's multiply-adds) at the
rate that one large float32 product reaches in the same process, over the time it took: what an ideal program would have needed.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitmed import cli, config, cost
from vitmed.models import attention, build, inputs, vit
from vitmed.runs import machine
from vitmed.training import augment, optim, programs, sharding, tasks

CALL_SECONDS = 2.0  # what a call lasts at most, where steps are short; training takes up to five
MOST_STEPS = 64
LONG = 20.0  # seconds of a step from which on one is enough
NUM_IMAGES = 256
MATRIX = 2048


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--variant", default="vit_ti", choices=sorted(build.VARIANTS))
    parser.add_argument("--rank", type=int, default=2, choices=(2, 3))
    parser.add_argument("--image", type=int, default=28, help="pixels along each axis")
    parser.add_argument("--patches", default="28,14,7,4,2,1")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1, help="runs trained together")
    parser.add_argument("--seconds", type=float, default=5.0, help="least time to measure per patch size")
    parser.add_argument("--attention", default="auto", choices=attention.FORMS)
    parser.add_argument("--scanned", action="store_true", help="one block compiled and looped over, instead of all in a row")
    parser.add_argument("--remat", default="none", choices=vit.REMATS)
    parser.add_argument("--micro", type=int, default=0, help="images of a step at a time; 0: as training does it")
    parser.add_argument("--dtype", default="float32", choices=sorted(build.DTYPES))
    return parser.parse_args(argv)


def recipe(args: argparse.Namespace, patch: int) -> programs.Recipe:
    """What is trained: a ViT from scratch on images of two classes."""
    architecture, size = build.VARIANTS[args.variant], (args.image,) * args.rank
    platform = jax.devices()[0].platform
    num_tokens = cost.num_tokens(size, (patch,) * args.rank)
    head_width = architecture.width // architecture.num_heads
    form = attention.resolve(args.attention, platform=platform, dtype=args.dtype, num_tokens=num_tokens, head_width=head_width)
    model = build.model(
        architecture,
        patch_size=(patch,) * args.rank,
        num_classes=2,
        dtype=args.dtype,
        attention=attention.choose(form, platform=platform, num_tokens=num_tokens),
        scanned=args.scanned,
        remat=args.remat,
    )
    return programs.Recipe(
        init=functools.partial(build.initialise, model, image_size=size, in_channels=3),
        apply=model.apply,
        prepare=functools.partial(inputs.prepare, in_channels=3, mean=(0.5,), std=(0.5,), image_size=size),
        task=tasks.TASKS["binary"],
        optimizer=optim.adamw(lambda step: 1e-4, weight_decay=0.05, beta1=0.9, beta2=0.999, epsilon=1e-8),
        augmentation=augment.Augmentation(),
        seeds=tuple(range(args.seeds)),
        mesh=sharding.make_mesh(data=1, fsdp=1, devices=jax.devices()[:1]),
        mapped=platform == "cpu",
        **programs.micro_batches(platform, batch_size=args.batch, num_tokens=num_tokens, micro_batch_size=args.micro)._asdict(),
    )


def measure(args: argparse.Namespace, patch: int) -> dict[str, Any]:
    """The median, and what it is a median of, for one patch size."""
    rng, size = np.random.default_rng(0), (args.image,) * args.rank
    made = recipe(args, patch)
    resident = {
        "images": rng.integers(0, 256, (NUM_IMAGES, *size, 1), np.uint8),
        "labels": rng.integers(0, 2, (NUM_IMAGES, 1), np.uint8),
    }
    resident = jax.device_put(resident, sharding.replicated(made.mesh))
    shape = (args.seeds, MOST_STEPS, args.batch)
    batches = {"indices": rng.integers(0, NUM_IMAGES, shape, np.int32), "mask": np.ones(shape, bool)}
    program, compile_seconds = programs.compile_chunk(made, batches, resident)
    state, _ = programs.create(made)

    def call(num_steps: int) -> float:
        nonlocal state
        started = time.perf_counter()
        state, losses = program(state, batches, num_steps, resident)
        jax.block_until_ready(losses)
        return (time.perf_counter() - started) / (num_steps * args.seeds)

    warm = _warm(call)
    steps = max(1, min(MOST_STEPS, int(CALL_SECONDS / (warm * args.seeds))))
    times, started = [], time.perf_counter()
    while len(times) < (1 if warm > LONG else 3) or time.perf_counter() - started < args.seconds:
        times.append(call(steps) * 1e3)
    milliseconds = statistics.median(times)
    architecture = build.VARIANTS[args.variant]
    gmacs = cost.gmacs_forward(
        image_size=size,
        patch_size=(patch,) * args.rank,
        in_channels=3,
        width=architecture.width,
        depth=architecture.depth,
        mlp_width=architecture.mlp_width,
        num_classes=2,
        num_pooled_tokens=1,
    )
    return {
        "ms": round(milliseconds, 2),
        "steps": steps * len(times) * args.seeds,
        "compile_s": round(compile_seconds, 2),
        "share": round(3 * gmacs * args.batch / (milliseconds / 1e3) / gmacs_per_second(), 3),
    }


def gmacs_per_second() -> float:
    """1e9 multiply-adds a second of one large float32 matrix product: the median of ten."""
    product = jax.jit(lambda a, b: a @ b)
    a = b = jnp.ones((MATRIX, MATRIX))
    times = []
    for _ in range(11):
        started = time.perf_counter()
        jax.block_until_ready(product(a, b))
        times.append(time.perf_counter() - started)
    return MATRIX**3 / 1e9 / statistics.median(times[1:])


def _warm(call: Callable[[int], float]) -> float:
    """Seconds of a step once the program has run; of the first, where that is long."""
    first = call(1)
    return first if first > LONG else min(call(1) for _ in range(2))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every patch size in turn."""
    args = arguments(argv)
    cli.compile_calls_once()
    result = {}
    for patch in map(int, args.patches.split(",")):
        result[patch] = measure(args, patch)
        print(patch, result[patch], flush=True)
    peak = machine.peak_memory_bytes(jax.devices()[:1])
    device = machine.device_name(jax.devices()[:1])
    print(json.dumps({"of": "vitmed", "rank": args.rank, "batch": args.batch, "device": device, "peak_mb": peak // 2**20, "steps": result}))


if __name__ == "__main__":
    try:
        main()
    except config.InputError as error:
        raise SystemExit(f"benchmarks.step: {error}") from error
