"""Client-level DP (McMahan et al., arXiv 1710.06963): the server clips each client's whole update and noises their sum.

The unit is one client with all its records. The server is trusted with the updates; whoever sees the models that it
sends out, or the final one, is the adversary. The clients' mean must be one linear object, and clients weigh the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedlab._validate import positive, probability
from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.lora.state import State
from fedlab.privacy.accounting import Event, Sampler
from fedlab.privacy.calibration import calibrate_sigma
from fedlab.privacy.clipping import clip_factors, joint_norms
from fedlab.privacy.ledger.terms import plan_terms
from fedlab.privacy.noise import GaussianNoise
from fedlab.privacy.plan import delta_of


@dataclass(frozen=True)
class ClientPlan:
    """What the server does in every round, and to how many clients.

    Every client of the population is charged, drawn or not.
    """

    n: int  # clients of the population (public)
    sampler: Sampler  # "full" | "poisson" | "fixed_wor"
    q: float  # probability (poisson) or share of the clients of a round
    sigma: float
    clip: float  # joint L2 norm C of one client's update
    delta: float
    rounds: int
    noise: str

    def __post_init__(self) -> None:
        for name in ("n", "q", "sigma", "clip", "delta", "rounds"):
            positive(**{name: getattr(self, name)})
        probability(q=self.q)

    @property
    def normaliser(self) -> float:
        """Expected clients per round, q·n; never the realised number, which depends on who is there."""
        return self.q * self.n

    def event(self, rounds: int = 1) -> Event:
        """The DP event of so many rounds."""
        return Event(self.sampler, self.q, self.sigma, rounds)

    def terms(self) -> dict[str, Any]:
        """What the server signs: see ``PLAN`` in docs/ledger.md."""
        return plan_terms(
            self.event(),
            unit="client",
            clip=self.clip,
            normaliser=self.normaliser,
            delta=self.delta,
            n=self.n,
            participations=self.rounds,
            noise=self.noise,
        )

    def mean(self, updates: Mapping[str, State], like: State, noise: GaussianNoise) -> State:
        """(Σ clipped updates + N(0, (σC)²)) / (q·n); noise alone if nobody is there.

        Formal guarantee: adding or removing one client moves the sum by at most C, whatever its update holds.

        Args:
            updates: client → update, with the names of ``like``; summed in the order of ids.
            like: name → tensor of the shape that is released.
            noise: the round's source; tensors draw in the order of their names.

        Returns:
            name → float32, computed in float64.
        """
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in like.items()}
        for _, update in sorted(updates.items()):
            norm = joint_norms(update[name][None] for name in total)
            factor = float(clip_factors(norm, self.clip))
            if factor > 0:  # 0 for NaN and infinity: left out, since 0·NaN is NaN
                for name, value in total.items():
                    value += factor * update[name].double()
        std = self.sigma * self.clip
        return {
            name: ((value + noise.draw(tuple(value.shape), std)) / self.normaliser).float()
            for name, value in sorted(total.items())
        }


def client_sampler(config: RunConfig) -> Sampler:
    """How the server draws the clients of a round, as the account has it."""
    if config.run.fraction == 1:
        return "full"
    return "poisson" if config.run.sampling == "poisson" else "fixed_wor"


def make_client_plan(config: RunConfig) -> ClientPlan:
    """The server's plan; σ is given, or calibrated so that all rounds together, of all tasks in a stream, spend at most
    ε.

    Raises ConfigError for weights that differ between clients, PrivacyError for a δ that promises nothing.
    """
    privacy, n = config.privacy, config.population
    assert privacy.clip is not None
    if config.strategy.weights != "uniform":
        raise ConfigError(
            f'strategy.weights = "{config.strategy.weights}" with privacy.unit = "client": a large client would move'
            ' the mean by more than the clip accounts for; set strategy.weights = "uniform"'
        )
    sampler = client_sampler(config)
    q = {"full": 1.0, "poisson": config.run.fraction}.get(sampler, config.clients_per_round / n)
    delta, rounds, sigma = delta_of(privacy, n), config.run.rounds, privacy.sigma
    whole = sum(config.task_rounds) if config.tasks else rounds
    if sigma is None:
        assert privacy.epsilon is not None
        # Without amplification n releases are one Gaussian; fixed-size draws move the sum by 2C.
        sigma = (2 if sampler == "fixed_wor" else 1) * calibrate_sigma(
            q if sampler == "poisson" else 1.0, whole, privacy.epsilon, delta
        )
    return ClientPlan(n, sampler, q, sigma, privacy.clip, delta, rounds, privacy.noise)
