"""Every form of attention on this device, forward and backward: milliseconds and the memory it keeps, by the number of tokens.

python -m benchmarks.attention --tokens=17,50,197,344,785,2745 --batch=4
"""

import argparse
import functools
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vitmed import cli, config
from vitmed.models import attention

FORMS = tuple(form for form in attention.FORMS if form != "auto")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__, formatter_class=about)
    parser.add_argument("--tokens", default="17,50,197,344,785,2745")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--head_width", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seconds", type=float, default=2.0, help="least time to measure per form and number")
    return parser.parse_args(argv)


def measure(form: str, shape: tuple[int, int, int, int], dtype: str, least: float) -> tuple[float, float]:
    """(median milliseconds, megabytes of temporaries) of value and gradients; config.InputError where the form cannot be here."""
    platform, (_, num_tokens, _, head_width) = jax.devices()[0].platform, shape
    resolved = attention.resolve(form, platform=platform, dtype=dtype, num_tokens=num_tokens, head_width=head_width)
    function = attention.choose(resolved, platform=platform, num_tokens=num_tokens)
    parts = [jax.random.normal(jax.random.key(number), shape, dtype) for number in range(4)]

    def both(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
        mixed, backward = jax.vjp(function, q, k, v)
        return mixed, *backward(gradient)

    compiled = jax.jit(both).lower(*parts).compile()
    call = functools.partial(compiled, *parts)
    jax.block_until_ready(call())
    times, started = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < least:
        before = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - before)
    return 1e3 * statistics.median(times), compiled.memory_analysis().temp_size_in_bytes / 1e6


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line per number of tokens."""
    args = arguments(argv)
    cli.compile_calls_once()
    platform = jax.devices()[0].platform
    print(f"| tokens | {' | '.join(f'{form} ms (MB)' for form in FORMS)} | auto takes |\n|---|{'---|' * len(FORMS)}---|")
    for num_tokens in map(int, args.tokens.split(",")):
        shape = (args.batch, num_tokens, args.heads, args.head_width)
        found = []
        for form in FORMS:
            try:
                found.append("{:.2f} ({:.1f})".format(*measure(form, shape, args.dtype, args.seconds)))
            except config.InputError:
                found.append("-")
        sizes = {"num_tokens": num_tokens, "head_width": args.head_width}
        taken = attention.resolve("auto", platform=platform, dtype=args.dtype, **sizes)
        print(f"| {num_tokens:,} | {' | '.join(found)} | {taken} |", flush=True)
    print(f"\n{jax.devices()[0].device_kind}, {jnp.dtype(args.dtype).name}, batch {args.batch}, {args.heads} heads of {args.head_width}")


if __name__ == "__main__":
    main()
