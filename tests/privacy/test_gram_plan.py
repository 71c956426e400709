"""The release at a task's end: noise, event and terms belong together, as in a plan of rounds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fedlab.config.tasks import Gram
from fedlab.privacy.accounting import Event
from fedlab.privacy.gram_plan import ATTEMPTS, GramPlan, gram_event
from fedlab.seeds import random_stream

PLAN = GramPlan(Gram(sigma=1.5, clip=0.4), n=200, delta=1e-6, noise="seeded")
NOTHING = {"a": torch.zeros(60, 60), "b": torch.zeros(30, 30)}


def test_as_many_releases_as_there_are_are_charged():
    assert PLAN.event() == Event("full", 1.0, 1.5, 1)
    assert [gram_event(PLAN.settings, count).steps for count in (0, 1, 3)] == [0, 1, 3]


def test_the_terms_are_those_of_this_release():
    terms = PLAN.terms()
    assert [float.fromhex(terms[name]) for name in ("clip", "normaliser", "delta")] == [0.4, 1.0, 1e-6]
    assert (terms["n"], terms["participations"], terms["noise"], terms["unit"]) == (200, ATTEMPTS, "seeded", "example")
    assert float.fromhex(terms["event"]["sigma"]) == 1.5


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_the_noise_is_sigma_times_the_clip_and_secure_noise_comes_from_no_seed(noise: str):
    plan = dataclasses.replace(PLAN, noise=noise)
    first, again = (plan.privatise(NOTHING, random_stream(0, "noise", "c", "gram")) for _ in range(2))
    for name, value in first.items():
        upper = value[torch.triu(torch.ones_like(value)) > 0]
        assert float(upper.std()) == pytest.approx(1.5 * 0.4, rel=0.1)
        assert torch.equal(value, again[name]) == (noise == "seeded")
