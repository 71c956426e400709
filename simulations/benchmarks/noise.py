"""Throughput of secure Gaussian noise beside seeded noise and PyTorch's own, interleaved, one thread.

python simulations/benchmarks/noise.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from fedlab.privacy.noise import SecureNoise, SeededNoise


def main() -> None:
    """Print million samples per second (median over repeats) and the ratio to seeded noise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=2_000_000, help="per draw")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    secure, seeded, shape = SecureNoise(), SeededNoise(np.random.Generator(np.random.Philox(0))), (args.samples,)
    ways: dict[str, Callable[[], object]] = {
        "secure (AES-256-CTR, Box–Muller, float64)": lambda: secure.draw(shape, 1.0),
        "seeded (numpy Philox, float64)": lambda: seeded.draw(shape, 1.0),
        "torch.randn (float32, tails cut at 5.77 σ on the CPU)": lambda: torch.randn(shape),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats + 1):
        for name, draw in ways.items():
            started = time.perf_counter()
            draw()
            seconds[name].append(time.perf_counter() - started)
    rates = {
        name: args.samples / statistics.median(times[1:]) / 1e6 for name, times in seconds.items()
    }  # the first warms up
    base = rates["seeded (numpy Philox, float64)"]
    print("| source | M samples/s | of seeded |\n|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.1f} | {rate / base:.2f} |")


if __name__ == "__main__":
    main()
