"""The audit's comparison of a shared pass with clients alone: silent on the real one, and
on each way to break it, not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedlab.config import RunConfig
from fedlab.errors import RunFailed
from fedlab.session import Session, open_session
from fedlab.train import cohort, fused
from fedlab.trainer_audit.observation import subject
from fedlab.trainer_audit.shared_pass import shared_pass


def session_of(toml: str, *overrides: str) -> Session:
    return open_session(RunConfig.parse(toml, overrides).to_toml())


@pytest.mark.parametrize("parts", [("lora_B", "head"), ("lora_A", "lora_B", "head"), ("lora_B",)])
@pytest.mark.parametrize(
    "overrides", [[], ["train.momentum=0.9", "train.physical_batch=3"], ["privacy.noise=secure", "lora.init_a=kaiming"]]
)
def test_a_correct_pass_is_believed(parts: tuple[str, ...], overrides: list[str], tiny_toml: str):
    assert shared_pass(subject(session_of(tiny_toml, *overrides), parts=parts)) == []


@pytest.mark.parametrize("overrides", [["run.cohort=1"], ["lora.dropout=0.3"], ["data.clients=1"]])
def test_one_client_alone_in_a_pass_and_dropout_are_looked_at_too(
    overrides: list[str], tiny_toml: str, monkeypatch: pytest.MonkeyPatch
):
    who = subject(session_of(tiny_toml, *overrides))
    assert shared_pass(who) == []
    monkeypatch.setattr(cohort, "row_factors", first_clip_for_all)
    assert shared_pass(who) != []


@pytest.mark.parametrize("gradients", ["hooks", "opacus"])
def test_nothing_is_said_where_no_pass_is_shared(gradients: str, tiny_toml: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedlab.trainer_audit.shared_pass.train_cohort", lambda *a: pytest.fail("no pass is shared"))
    assert shared_pass(subject(session_of(tiny_toml, f"train.gradients={gradients}"))) == []


def unclipped(gradients: dict[str, torch.Tensor], limits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(len(limits), dtype=torch.float64), torch.zeros(len(limits), dtype=torch.bool)


def first_clip_for_all(gradients: dict[str, torch.Tensor], limits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return FACTORS(gradients, limits * 0 + limits[0] * 0.5)


def everything_to_the_first(total: dict, gradients: dict, factors: Any, owner: torch.Tensor) -> None:
    ADD(total, gradients, factors, owner * 0)


def last_row_left_out(total: dict, gradients: dict, factors: Any, owner: torch.Tensor) -> None:
    ADD(total, {n: g[:-1] for n, g in gradients.items()}, factors[:-1], owner[:-1])


def one_step_less(active: list, step: int) -> Any:
    batch = DRAW(active, step)
    return batch if step == 0 else cohort.Batch(batch.rows[:0], batch.owner[:0], batch.counts * 0, batch.keys[:0])


def of_the_first(tensors: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    return tensors[0] if tensors.ndim == 3 else tensors


FACTORS, ADD, DRAW = cohort.row_factors, cohort.add_by_client, cohort.draw
BROKEN: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "clipping skipped": (cohort, "row_factors", unclipped),
    "another clip": (cohort, "row_factors", first_clip_for_all),
    "rows of all clients in the first one's sum": (cohort, "add_by_client", everything_to_the_first),
    "the last row of a chunk left out": (cohort, "add_by_client", last_row_left_out),
    "no batch after the first step": (cohort, "draw", one_step_less),
    "B of the first client for everybody": (fused, "_of", of_the_first),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pass_is_found(name: str, tiny_toml: str, monkeypatch: pytest.MonkeyPatch):
    owner, attribute, broken = BROKEN[name]
    monkeypatch.setattr(owner, attribute, broken)
    session = session_of(
        tiny_toml, "privacy.sigma=0.01", "privacy.clip=0.05"
    )  # every gradient is clipped, and no noise is in the way
    who = subject(session, parts=("lora_A", "lora_B", "head"))
    found = shared_pass(who)
    assert found
    assert "releases another update from a shared pass than alone" in found[0]


def test_a_pass_that_fails_is_a_finding(tiny_toml: str, monkeypatch: pytest.MonkeyPatch):
    real = cohort.train_cohort
    monkeypatch.setattr(
        "fedlab.trainer_audit.shared_pass.train_cohort", lambda *a: real(*a) | {"client-1": RunFailed("it broke")}
    )
    (found,) = shared_pass(subject(session_of(tiny_toml)))
    assert found == "client-1 fails in a shared pass, and not alone: it broke"
