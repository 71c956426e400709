"""What an owner signs: every term is what it is called, and another scope is another hash."""

from __future__ import annotations

import pytest

from fedlab.privacy.accounting import Event
from fedlab.privacy.ledger.terms import TERMS, budget_terms, plan_terms, run_terms, scope_of

SHAPES = {"a.lora_B": (4, 2), "head.weight": (3, 8)}


@pytest.mark.parametrize(
    "other",
    [
        {"a.lora_B": (2, 4), "head.weight": (3, 8)},
        {"a.lora_B": (4, 3), "head.weight": (3, 8)},
        {"b.lora_B": (4, 2), "head.weight": (3, 8)},
        {"a.lora_B": (4, 2)},
        {"a.lora_B": (3, 8), "head.weight": (4, 2)},
    ],
)
def test_another_scope_has_another_hash_and_the_order_of_names_is_none(other: dict[str, tuple[int, ...]]):
    assert scope_of(other) != scope_of(SHAPES)
    assert scope_of(dict(reversed(SHAPES.items()))) == scope_of(SHAPES)


def test_every_term_is_what_it_is_called():
    event = Event("poisson", 0.05, 0.9, 4)
    terms = plan_terms(
        event, unit="example", clip=1.5, normaliser=32.0, delta=1e-6, n=640, participations=9, noise="secure"
    )
    terms |= {"scope": scope_of(SHAPES), "budget": budget_terms(8.0, 1e-5), "content": None}
    terms |= run_terms("c" * 64, ["timing", "size"])
    assert terms.keys() == set(TERMS)
    assert [float.fromhex(terms[name]) for name in ("clip", "normaliser", "delta")] == [1.5, 32.0, 1e-6]
    assert (terms["n"], terms["participations"], terms["noise"], terms["unit"]) == (640, 9, "secure", "example")
    assert {name: float.fromhex(value) for name, value in terms["budget"].items()} == {"epsilon": 8.0, "delta": 1e-5}
    assert (terms["configuration"], terms["releases"]) == ("c" * 64, ["size", "timing"])
    assert (float.fromhex(terms["event"]["q"]), float.fromhex(terms["event"]["sigma"])) == (0.05, 0.9)
