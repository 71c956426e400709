"""What this machine does well, by trying, and what its memory allocator is told."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import time
from functools import lru_cache

import torch

from fedlab.config import RunConfig
from fedlab.models.loading import device_of

logger = logging.getLogger("fedlab")
GAIN = 1.3  # of a bfloat16 product, below which conversions eat it up
SHAPES = {
    "cpu": (512, 384),
    "cuda": (4096, 4096),
}  # rows and width of the product that is timed, so large that its start is nothing
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def resolve_dtype(config: RunConfig) -> RunConfig:
    """``run.dtype = "auto"`` becomes bfloat16 where the device multiplies it faster than float32, else float32.

    Warns where bfloat16 was asked for and is slower.
    """
    if config.run.dtype == "float32":
        return config
    gain = bfloat16_gain(device_of(config.run.device).type)
    if config.run.dtype == "bfloat16":
        if gain < 1:
            logger.warning(
                'run.dtype = "bfloat16" runs at %.2f of the speed of float32 on this device; "auto" would not use it',
                gain,
            )
        return config
    dtype = "bfloat16" if gain >= GAIN else "float32"
    return config.model_copy(update={"run": config.run.model_copy(update={"dtype": dtype})})


@lru_cache
def bfloat16_gain(device: str) -> float:
    """Speed of a bfloat16 matrix product relative to float32, the better of three, in about 0.1 s."""
    seconds: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows, width = SHAPES.get(device, SHAPES["cpu"])
        a, b = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, width), (width, width)))
        for _ in range(4):
            started = time.perf_counter()
            a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[dtype] = min(seconds.get(dtype, float("inf")), time.perf_counter() - started)
    return seconds[torch.float32] / seconds[torch.bfloat16]


@lru_cache
def return_large_blocks() -> None:
    """Let glibc give freed blocks above 1 MB back at once, for the rest of the process; elsewhere nothing happens.

    It otherwise keeps them, in pieces that later tensors do not fit into: peak memory is then twice what is in use, and
    checkpointing saves nothing. The price is fresh pages for every large tensor, about a quarter of the speed.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
