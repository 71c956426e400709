"""What an owner allows: the policy of its own file for a deployed client, the run's own word in a simulation.

A policy is asked twice. ``problem`` is asked of every request, before data are opened, with what the configuration
says; ``problem_of_plan`` is asked once, before a plan is signed, with what the number of records makes of it. Both
answer in words of the configuration and of the policy, since they stand in the ledger, which leaves: no record goes
into them, and no place where records are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedlab.config import RunConfig
from fedlab.config.client import OWN, ClientFile, ClientPolicy
from fedlab.objectives import objective_class
from fedlab.privacy.accounting import Event, epsilon
from fedlab.privacy.plan import DPPlan
from fedlab.privacy.release import public_names
from fedlab.privacy.scores_plan import problem_of_scores


class Policy(Protocol):
    """What an owner allows."""

    @property
    def unit(self) -> str:
        """What a run must protect: "example", "client" or "none"."""

    @property
    def one_answer(self) -> bool:
        """Whether a round that was committed is answered with the same bytes again, or not at all."""

    def problem(self, config: RunConfig, parts: Sequence[str]) -> str | None:
        """Which key of a configuration it does not allow, or None. ``parts``: the most that is ever trained."""

    def problem_of_plan(self, plan: DPPlan, beside: Sequence[Event]) -> str | None:
        """Which term of a plan it does not allow, or None. ``beside``: events of the run beside its rounds."""


@dataclass(frozen=True)
class SimulationPolicy:
    """Of the owners of a simulation: whatever the run says, since who simulates holds all data anyway.

    A round that is repeated is computed and, where noise is secure, charged anew.
    """

    unit: str
    one_answer: bool = False

    def problem(self, config: RunConfig, parts: Sequence[str]) -> str | None:
        """Nothing."""
        return None

    def problem_of_plan(self, plan: DPPlan, beside: Sequence[Event]) -> str | None:
        """Nothing."""
        return None


@dataclass(frozen=True)
class OwnPolicy:
    """Of a client on a machine of its own.

    Args:
        rules: its owner's, of ``client.toml``.
        models: base models that may be run on the data.
        budgeted: whether its owner set a budget over all runs.
        purged: whether held-out records are left out whose text is trained on.
        rostered: whether its owner named peers of a sum, and their keys.
    """

    rules: ClientPolicy
    models: tuple[str, ...]
    budgeted: bool
    purged: bool = False
    rostered: bool = False
    one_answer: bool = True

    @classmethod
    def of(cls, file: ClientFile) -> OwnPolicy:
        """What a client's file says."""
        rostered = bool(file.roster.keys() - {file.client.id})
        return cls(file.policy, tuple(file.models), file.budget is not None, file.data.duplicates == "purge", rostered)

    @property
    def unit(self) -> str:
        """What a run must protect."""
        return self.rules.unit

    def problem(self, config: RunConfig, parts: Sequence[str]) -> str | None:
        """The first key that it does not allow."""
        return next(self._problems(config, parts), None)

    def problem_of_plan(self, plan: DPPlan, beside: Sequence[Event]) -> str | None:
        """The first term that it does not allow."""
        return next(self._problems_of_plan(plan, beside), None)

    def _problems(self, config: RunConfig, parts: Sequence[str]) -> Iterator[str]:
        rules, privacy = self.rules, config.privacy
        if privacy.unit != rules.unit:
            yield f'privacy.unit = "{privacy.unit}", the policy wants "{rules.unit}"'
        if config.private and privacy.noise != rules.noise:
            yield f'privacy.noise = "{privacy.noise}", the policy wants "{rules.noise}"'
        if rules.unit == "example" and not self.budgeted:
            yield "there is no budget: without one, runs could follow runs for ever"
        if rules.max_clip is not None and privacy.clip is not None and privacy.clip > rules.max_clip:
            yield f"privacy.clip = {privacy.clip:g}, the policy allows at most {rules.max_clip:g}"
        if config.shared_noise and not rules.shared_noise:
            yield "privacy.survivors is given: the policy does not allow noise that is shared (shared_noise)"
        if config.shared_noise and not self.rostered:
            yield "privacy.survivors is given, and the client's [roster] names no peers, so a server could invent them"
        honest = (privacy.survivors or 0) - privacy.colluding
        if config.shared_noise and honest < rules.min_honest:
            yield (
                f"privacy.survivors − colluding = {honest}: the policy wants the noise of at least"
                f" {rules.min_honest} honest clients"
            )
        if config.train.sampling_rate is None and config.train.batch_size < rules.min_batch:
            yield f"train.batch_size = {config.train.batch_size}, the policy wants at least {rules.min_batch}"
        if odd := sorted(set(parts) - set(rules.trained)):
            yield f"{odd[0]} is to be trained, which the policy does not allow"
        if odd := [name for name in public_names(config) if name not in rules.releases]:
            yield f"the release {odd[0]!r} is not among those of the policy"
        if (
            problem := problem_of_scores(config, objective_class(config.objective.name).primary, self.purged)
        ) is not None:
            yield problem
        if objective_class(config.objective.name).named and not config.objective.labels:
            yield "objective.labels is empty: clients that number their labels themselves number them differently"
        asked = {"data.canaries": config.data.canaries, "evaluate.membership": config.evaluate.membership}
        if odd := [key for key, value in asked.items() if value is not None]:
            yield f"{odd[0]} is for simulations: it asks what was learnt of single records"
        if config.model.name not in self.models:
            yield "model.name is not among the client's models"
        if odd := sorted({key for task in config.tasks for key in task.data} & set(OWN)):
            yield f"[[tasks]]: data.{odd[0]} of a task names a place, and a client's data are its own"
        yield from self._problems_of_noise(privacy.sigma, privacy.epsilon, privacy.delta)

    def _problems_of_noise(self, sigma: float | None, spent: float | None, delta: float | None) -> Iterator[str]:
        rules = self.rules
        if rules.min_sigma is not None and sigma is not None and sigma < rules.min_sigma:
            yield f"σ = {sigma:g}, the policy wants at least {rules.min_sigma:g}"
        if rules.max_epsilon is not None and spent is not None and spent > rules.max_epsilon:
            yield f"ε = {spent:.4g} for the run, the policy allows at most {rules.max_epsilon:g}"
        if delta is not None and delta > rules.max_delta:
            yield f"δ = {delta:g}, the policy allows at most {rules.max_delta:g}"

    def _problems_of_plan(self, plan: DPPlan, beside: Sequence[Event]) -> Iterator[str]:
        if plan.normaliser < self.rules.min_batch:
            yield f"{plan.normaliser:g} expected examples per step, the policy wants at least {self.rules.min_batch}"
        spent = None
        if self.rules.max_epsilon is not None:
            spent = epsilon([plan.event(plan.participations), *beside], plan.delta)
        for sigma in (plan.sigma, *(event.sigma for event in beside)):
            yield from self._problems_of_noise(sigma, spent, plan.delta)
