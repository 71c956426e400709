"""The one privacy object of a client: it draws the batches, adds the noise, **and** states the DP event that they
amount to.

Accounting cannot describe another mechanism than the one that runs, because both come from here. The mechanism is
DP-SGD (Abadi et al., arXiv 1607.00133): Poisson batches, per-example gradients clipped to C by one joint norm, N(0,
(σC)²) on their sum, divided by the *expected* batch size. Neighbours: add or remove one example of this client.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlab._validate import positive
from fedlab.config import RunConfig
from fedlab.config.sections import PrivacySection, TrainSection
from fedlab.errors import ConfigError, PrivacyError, Unreachable
from fedlab.privacy.accounting import DISCRETE, Accountant, Event, Sampler, epsilon
from fedlab.privacy.calibration import calibrate_sigma
from fedlab.privacy.discrete_gaussian import SeededWords, Words, discrete_gaussian
from fedlab.privacy.gram_plan import gram_event
from fedlab.privacy.ledger.terms import plan_terms
from fedlab.privacy.noise import GaussianNoise, SecureNoise, SecureStream, SeededNoise
from fedlab.privacy.noise_share import NoiseShare
from fedlab.privacy.sampling import Uniform, poisson_batch
from fedlab.privacy.scores_plan import scores_event

SHARED_DELTA = 1e-5  # under shared noise, where none is configured


@dataclass(frozen=True)
class DPPlan:
    """What one client does in every round it takes part in, and how often it may."""

    n: int  # examples of the client (public)
    batch_size: int  # expected examples per step
    steps: int  # per round
    sigma: float  # noise multiplier: noise std / clip
    clip: float  # joint L2 norm C of one example's gradient
    delta: float
    participations: int  # rounds at most
    noise: str  # "seeded" | "secure"
    rate: float | None = None  # probability with which an example enters a batch; default: batch_size / n
    shared: NoiseShare | None = None  # how the noise is split among clients; None: it is all this client's own

    def __post_init__(self) -> None:
        for name in ("n", "batch_size", "steps", "sigma", "clip", "delta", "participations"):
            positive(**{name: getattr(self, name)})
        if not 0 < self.sigma * self.clip < math.inf:
            raise ValueError(f"sigma·clip, the noise, must be positive and finite, got {self.sigma} × {self.clip}")
        if self.noise not in ("seeded", "secure"):
            raise ValueError(f"noise must be 'seeded' or 'secure', got {self.noise!r}")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {self.rate}")
        if self.shared is not None and (self.rate is None or self.steps != 1):
            raise ValueError("shared noise needs one rate for all clients and one step per round")

    @property
    def q(self) -> float:
        """Probability with which an example enters a batch."""
        return min(1.0, self.batch_size / self.n) if self.rate is None else self.rate

    @property
    def normaliser(self) -> float:
        """Expected batch size q·n. Never the realised one: dividing by that would double the sensitivity."""
        return self.q * self.n

    def event(self, rounds: int = 1) -> Event:
        """The DP event of so many rounds; under shared noise, of the sum that the server sees."""
        return Event("poisson" if self.shared is None else DISCRETE, self.q, self.sigma, self.steps * rounds)

    def shared_terms(self, dimension: int) -> dict[str, Any] | None:
        """``shared`` of what the client signs, for a scope of so many coordinates; None if all noise is its own."""
        return None if self.shared is None else self.shared.terms(self.sigma, dimension)

    def terms(self) -> dict[str, Any]:
        """What the client signs: see ``PLAN`` in docs/ledger.md. ``shared`` depends on the scope and is the owner's."""
        return plan_terms(
            self.event(),
            unit="example",
            clip=self.clip,
            normaliser=self.normaliser,
            delta=self.delta,
            n=self.n,
            participations=self.participations,
            noise=self.noise,
        )

    def sampler(self, rng: np.random.Generator) -> Uniform:
        """What draws the batches: ``rng`` when seeded; when secure, the operating system: sampling amplifies only what
        nobody foresees.
        """
        return rng if self.noise == "seeded" else SecureStream()

    def batch(self, rng: np.random.Generator) -> np.ndarray:
        """Positions of one step's examples, 0 to n − 1; possibly none, which is a step like any other."""
        return poisson_batch(self.n, self.q, self.sampler(rng))

    def noise_source(self, rng: np.random.Generator) -> GaussianNoise:
        """The noise of one round: ``rng`` when seeded; when secure, the operating system's, and
        ``rng`` is not touched.
        """
        return SeededNoise(rng) if self.noise == "seeded" else SecureNoise()

    def privatise(self, clipped_sum: Mapping[str, Tensor], noise: GaussianNoise) -> dict[str, Tensor]:
        """(Σ clipped gradients + N(0, (σC)²)) / (q·n) for every tensor.

        Args:
            clipped_sum: name → sum over the batch; together they move by at most C if one example is added or removed.
            noise: the round's source; tensors draw in the order of their names.

        Returns:
            name → float64 tensor of the same shape, on the same device.

        Raises:
            PrivacyError: under shared noise, where no client's own noise is enough for what it sends.
        """
        if self.shared is not None:
            raise PrivacyError("a client's share of the noise does not protect its update; use share_of, and a sum")
        names = sorted(clipped_sum)
        drawn = [noise.draw(tuple(clipped_sum[name].shape), self.sigma * self.clip).flatten() for name in names]
        total = torch.cat([clipped_sum[name].flatten().double() for name in names])
        # joined, so that noise goes to a GPU in one piece
        released = (total + torch.cat(drawn).to(total.device)) / self.normaliser
        parts = released.split([len(part) for part in drawn])
        return {name: part.view(clipped_sum[name].shape) for name, part in zip(names, parts, strict=True)}

    def noise_words(self, rng: np.random.Generator) -> Words:
        """The source of one round's share: as ``noise_source``, in integers."""
        return SeededWords(rng) if self.noise == "seeded" else SecureStream()

    def share_of(self, clipped_sum: Mapping[str, Tensor], dimension: int, source: Words) -> dict[str, np.ndarray]:
        """Σ clipped gradients on the grid, plus this client's share of the noise.

        What comes out protects nobody by itself: it may leave in a sum over at least ``shared.survivors`` clients.

        Args:
            clipped_sum: name → float64 sum over the batch; together they move by at most C if one example is added or
                removed.
            dimension: coordinates of the signed scope, of which ``clipped_sum`` is all or a part.
            source: the round's words; tensors draw in the order of their names.

        Returns:
            name → int64 array of the same shape, to be added modulo 2^64.

        Raises:
            ValueError: a plan without shared noise.
            PrivacyError: more coordinates than were signed, or a sum that is none of clipped gradients.
        """
        if self.shared is None:
            raise ValueError("this plan's noise is all the client's own; use privatise")
        names = sorted(clipped_sum)
        counts = [clipped_sum[name].numel() for name in names]
        if sum(counts) > dimension:
            raise PrivacyError(f"{sum(counts)} coordinates were summed, the signed scope has {dimension}")
        encoded = [
            self.shared.encode(clipped_sum[name].detach().cpu().double().numpy(), self.clip, self.n * self.clip)
            for name in names
        ]  # all before any noise is drawn
        noise = discrete_gaussian(sum(counts), self.shared.std(self.sigma, dimension), source)
        parts = np.split(noise, np.cumsum(counts)[:-1])
        return {
            name: value + part.reshape(value.shape) for name, value, part in zip(names, encoded, parts, strict=True)
        }

    def epsilon(self, rounds: int) -> float:
        """ε of so many rounds at this plan's δ (PLD, under shared noise RDP; an upper bound)."""
        return epsilon([self.event(rounds)], self.delta)


def default_delta(n: int) -> float:
    """min(1e-5, 1/(10·n)) for a client of n examples."""
    return min(1e-5, 1 / (10 * n))


def delta_of(privacy: PrivacySection, n: int) -> float:
    """δ for a client of n examples (or n clients): the configured one, the budget's, or the default.

    Under shared noise the default does not depend on n: every client's claim rests on the others' shares, so all must
    come to one σ.

    Raises:
        Unreachable: a δ that promises nothing (δ·n ≥ 1). Above 0.1 it warns.
    """
    budget = privacy.budget.delta if privacy.budget is not None else None
    default = default_delta(n) if privacy.survivors is None else SHARED_DELTA
    delta = next((d for d in (privacy.delta, budget) if d is not None), default)
    if delta * n >= 1:
        raise Unreachable(
            f"privacy.delta = {delta:g} with {n} examples: δ·n >= 1 allows publishing a record outright; use at most"
            f" {1 / (10 * n):.1g}"
        )
    if delta * n > 0.1:
        warnings.warn(f"privacy.delta = {delta:g} with {n} examples: δ·n = {delta * n:.2g} is above 0.1", stacklevel=3)
    return delta


def plan_of(config: RunConfig, n: int, sizes: Sequence[int] = ()) -> DPPlan:
    """The plan of a client of n examples in this run.

    In a stream ``sizes`` are its examples in every task. σ and δ are then one for all tasks, and σ is calibrated for
    the rounds of all of them and the releases between them: what a client takes part in spends ε over the whole stream,
    not in each task.
    """
    if not config.tasks:
        sigma = config.privacy.scores_sigma
        scored = () if sigma is None else (scores_event(sigma),)
        return make_plan(config.privacy, config.train, n, config.participations, (), scored)
    rounds = [config.run.rounds] if config.stream.joint else config.task_rounds
    tasks = tuple((m, -(-config.participations * r // config.run.rounds)) for m, r in zip(sizes, rounds, strict=True))
    gram = config.gram
    beside = (gram_event(gram, len(config.tasks) - 1),) if gram is not None and len(config.tasks) > 1 else ()
    return make_plan(config.privacy, config.train, n, config.participations, tasks, beside)


@lru_cache(maxsize=4096)
def make_plan(
    privacy: PrivacySection,
    train: TrainSection,
    n: int,
    participations: int,
    tasks: tuple[tuple[int, int], ...] = (),
    beside: tuple[Event, ...] = (),
) -> DPPlan:
    """The plan of a client of n examples; σ is given, or calibrated so that ``participations`` whole rounds spend at
    most ε.

    ``tasks`` (examples, rounds) is what σ is calibrated for in a stream, together with the events ``beside``; δ is the
    smallest of its tasks. Where their sampling rates differ, σ is calibrated by RDP, which is never below what is
    spent, in a fraction of the time.

    Raises ConfigError for a unit that is not available, PrivacyError for a δ that promises nothing or releases that
    leave nothing of ε.
    """
    positive(n=n)
    positive(participations=participations)
    if privacy.unit != "example":
        raise ConfigError(f'privacy.unit = "{privacy.unit}" has no plan of a client; see fedlab.privacy.client_level')
    assert privacy.clip is not None
    parts = tasks or ((n, participations),)
    shared = None if privacy.survivors is None else NoiseShare(privacy.survivors, privacy.colluding)
    delta = min(delta_of(privacy, m) for m, _ in parts)
    sigma = privacy.sigma
    if sigma is None:
        assert privacy.epsilon is not None
        if beside and (taken := epsilon(beside, delta)) >= privacy.epsilon:
            key = "strategy.gram.sigma" if tasks else "privacy.scores_sigma"
            raise Unreachable(
                f"privacy.epsilon = {privacy.epsilon:g}: the releases beside the rounds alone spend {taken:.2f}; raise"
                f" {key} = {beside[0].sigma:g} or privacy.epsilon"
            )
        counts: dict[float, int] = {}
        for m, rounds in parts:
            counts[train.rate(m)] = counts.get(train.rate(m), 0) + train.local_steps(m) * rounds
        (q, count), *others = sorted(counts.items())
        by: Accountant = "rdp" if others or shared else "pld"
        sampler: Sampler = DISCRETE if shared else "poisson"
        sigma = calibrate_sigma(q, count, privacy.epsilon, delta, by, beside, tuple(others), sampler)
    return DPPlan(
        n,
        train.batch_size,
        train.local_steps(n),
        sigma,
        privacy.clip,
        delta,
        participations,
        privacy.noise,
        train.sampling_rate,
        shared,
    )
