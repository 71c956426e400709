"""An exact sampler of the discrete Gaussian, vectorised (Canonne, Kamath and Steinke, arXiv 2004.00010, algorithm 3).

P(x) ∝ exp(−x²/2σ²) on the integers: floating-point noise has no place in a sum modulo 2^64, and its low bits would tell
what it was added to (Mironov, 2012). A discrete Laplace is proposed and accepted with the exact probability. Every
comparison of a uniform number with a real one is made in float64 with a bound on its error; where the two are closer
than the bound, the uniform number is continued word by word and compared in decimals, until they differ. So what comes
out has exactly the distribution, provided that numpy's exp and log are right to 2^-48 (they are to a few 2^-53).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from typing import Protocol

import numpy as np

from fedlab._validate import non_negative, positive

ERROR = 2.0**-48  # relative, of a logarithm, an exponential or a quotient in float64
LEAST = 2.0**-16  # uniform numbers below are looked at one by one
MOST_STD = 2.0**40  # beyond it a proposal may be no integer of float64
CHUNK = 2**16  # proposals at once: what stays in a processor's cache


class Words(Protocol):
    """A source of independent uniform 64-bit words: ``SeededWords``, or ``noise.SecureStream``."""

    def words(self, size: int, /) -> np.ndarray:
        """``size`` uint64."""


class SeededWords:
    """Words from a named stream: repeatable, and therefore no protection."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def words(self, size: int, /) -> np.ndarray:
        """``size`` uniform uint64."""
        return self._rng.integers(0, 2**64, size, dtype=np.uint64)


def discrete_gaussian(count: int, std: float, source: Words) -> np.ndarray:
    """Independent samples of the discrete Gaussian with P(x) ∝ exp(−x²/2·std²).

    Args:
        count: how many, ≥ 0.
        std: its parameter σ in (0, 2^40], taken as the exact value of this float64.
        source: uniform words; how many it gives depends on what is drawn.

    Returns:
        int64 [count].

    Raises:
        ValueError: an argument is out of range.
    """
    non_negative(count=count)
    positive(std=std)
    if std > MOST_STD:
        raise ValueError(f"std must be at most 2^40, got {std:g}")
    result, filled = np.empty(count, dtype=np.int64), 0
    while filled < count:
        wanted = count - filled
        found = _accepted(min(CHUNK, wanted + wanted * 3 // 8 + 64), std, source)[:wanted]
        result[filled : filled + len(found)] = found
        filled += len(found)
    return result


def _accepted(proposals: int, std: float, source: Words) -> np.ndarray:
    """What is accepted of so many proposals of a discrete Laplace of scale t = ⌊std⌋ + 1, in order."""
    t = math.floor(std) + 1
    words = source.words(2 * proposals)
    size = _geometric(words[:proposals], t, source)
    last = words[proposals:]
    negative = (last & np.uint64(1)).astype(bool)  # one bit for the sign, 63 for the decision
    # exp(−(|y| − σ²/t)²/2σ²), as −(y/σ − σ/t)²/2. The exponent is off by at most (1 + y/σ)²·ERROR, and that times the
    # exponential is below 6·ERROR for every y, as σ < t.
    chance = size / std
    chance -= std / t
    chance *= chance
    chance *= -0.5
    np.exp(chance, out=chance)
    gap = (last >> np.uint64(1)) * 2.0**-63
    gap -= chance
    take = gap < 0
    for i in np.flatnonzero(np.abs(gap) < 8 * ERROR):
        take[i] = _below_exponential(int(last[i]) >> 1, 63, _exponent(int(size[i]), std, t), source)
    take &= ~(negative & (size == 0))  # zero would come twice as often
    chosen = size[take]
    np.negative(chosen, out=chosen, where=negative[take])
    return chosen


def _geometric(words: np.ndarray, t: int, source: Words) -> np.ndarray:
    """k with P(k ≥ m) = exp(−m/t): ⌊−t·ln u⌋ for u uniform in (0, 1), of which a word holds the first 64 bits."""
    value = words * 2.0**-64
    small = value < LEAST  # rare, and where the bits that are missing count
    value[small] = 0.5
    np.log(value, out=value)
    value *= -t
    floor = np.floor(value)
    value -= floor
    # −ln u ≤ 11.1 with an error of 11.1·ERROR, and 2^-64/u ≤ ERROR for the missing bits
    error = 13 * t * ERROR
    unclear = (value <= error) | (value >= 1 - error)
    unclear |= small
    result = floor.astype(np.int64)
    for i in np.flatnonzero(unclear):
        result[i] = _geometric_exact(int(words[i]), t, source)
    return result


def _geometric_exact(word: int, t: int, source: Words) -> int:
    """⌊−t·ln u⌋, with as many bits of u as that takes."""
    for value, bits in _continued(word, 64, source):
        if value == 0:
            continue
        context = Context(prec=40 + bits)
        one = Decimal(1 << bits)
        ends = []
        for end in (value, value + 1):  # u lies between; the correctly rounded ln is off by less than 10^-(prec − 4)
            logarithm = context.multiply(Decimal(-t), context.ln(context.divide(Decimal(end), one)))
            slack = context.multiply(context.add(abs(logarithm), Decimal(t)), Decimal(10) ** (8 - context.prec))
            ends += [context.subtract(logarithm, slack), context.add(logarithm, slack)]
        least, most = (int(e.to_integral_value(ROUND_FLOOR)) for e in (min(ends), max(ends)))
        if least == most:
            return least
    raise AssertionError("unreachable")


def _exponent(size: int, std: float, t: int) -> Fraction:
    """(|y| − σ²/t)²/2σ² as a fraction: σ is a float64 and therefore one too."""
    square = Fraction(std) ** 2
    return (size - square / t) ** 2 / (2 * square)


def _below_exponential(value: int, bits: int, exponent: Fraction, source: Words) -> bool:
    """Whether u < exp(−exponent), where ``value`` holds the first bits of a uniform u."""
    for numerator, length in _continued(value, bits, source):
        context = Context(prec=40 + length)
        chance = context.exp(context.divide(Decimal(-exponent.numerator), Decimal(exponent.denominator)))
        slack = context.multiply(chance, Decimal(10) ** (8 - context.prec))
        slack = context.multiply(slack, Decimal(1 + math.ceil(exponent)))
        one = Decimal(1 << length)
        scaled_low = context.multiply(context.subtract(chance, slack), one)
        scaled_high = context.multiply(context.add(chance, slack), one)
        if numerator + 1 <= scaled_low:
            return True
        if numerator >= scaled_high:
            return False
    raise AssertionError("unreachable")


def _continued(value: int, bits: int, source: Words) -> Iterator[tuple[int, int]]:
    """(first bits of a uniform number as an integer, how many), longer by 64 each time."""
    while True:
        yield value, bits
        value, bits = (value << 64) | int(source.words(1)[0]), bits + 64
