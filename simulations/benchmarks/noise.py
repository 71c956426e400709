"""Throughput of secure Gaussian noise beside seeded noise, PyTorch's own and exact discrete noise, interleaved, one
thread.

python simulations/benchmarks/noise.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from common import header, interleaved, line, parser, write_json

from fedlab.privacy.discrete_gaussian import discrete_gaussian
from fedlab.privacy.noise import SecureNoise, SeededNoise


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Print and return million samples per second (median over repeats) and the ratio to seeded noise."""
    options = parser(__doc__)
    options.add_argument("--samples", type=int, default=2_000_000, help="per draw")
    options.add_argument("--repeats", type=int, default=7)
    args = options.parse_args(arguments)
    torch.set_num_threads(1)
    secure, seeded, shape = SecureNoise(), SeededNoise(np.random.Generator(np.random.Philox(0))), (args.samples,)
    ways: dict[str, Callable[[], object]] = {
        "secure (AES-256-CTR, Box–Muller, float64)": lambda: secure.draw(shape, 1.0),
        "seeded (numpy Philox, float64)": lambda: seeded.draw(shape, 1.0),
        "discrete Gaussian (exact, std 1e6 steps, AES-256-CTR)": lambda: discrete_gaussian(args.samples, 1e6, secure),
        "torch.randn (float32, tails cut at 5.77 σ on the CPU)": lambda: torch.randn(shape),
    }
    seconds = interleaved(ways, args.repeats, time.perf_counter)
    rates = {name: args.samples / statistics.median(times) / 1e6 for name, times in seconds.items()}
    base = rates["seeded (numpy Philox, float64)"]
    print(header("source", "M samples/s", "of seeded"))
    for name, rate in rates.items():
        print(line(name, f"{rate:.1f}", f"{rate / base:.2f}"))
    write_json(args.json, {"samples": args.samples, "million_per_second": rates})
    return rates


if __name__ == "__main__":
    main()
