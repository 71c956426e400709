"""Names, checks, digests and the wire."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlab.lora.state import (
    check_update,
    digest,
    effective_delta,
    from_wire,
    modules,
    nbytes,
    part_of,
    select,
    to_wire,
)

STATE = {
    "enc.0.q.lora_A": torch.randn(2, 5, generator=torch.Generator().manual_seed(0)),
    "enc.0.q.lora_B": torch.randn(4, 2, generator=torch.Generator().manual_seed(1)),
    "head.classifier.weight": torch.ones(3, 4),
}


def test_names_and_parts():
    assert modules(STATE) == ("enc.0.q",)
    assert list(select(STATE, {"lora_B", "head"})) == ["enc.0.q.lora_B", "head.classifier.weight"]
    with pytest.raises(ValueError, match="no state name"):
        part_of("enc.0.weight")
    with pytest.raises(ValueError, match="only one of"):
        modules({"a.lora_A": torch.zeros(1, 1)})


def test_effective_delta_is_scale_times_product():
    found = effective_delta(STATE, "enc.0.q", 4.0)
    assert torch.allclose(found, 4.0 * (STATE["enc.0.q.lora_B"] @ STATE["enc.0.q.lora_A"]))


def test_the_residual_is_scaled_like_the_product():
    residual = {"enc.0.q.residual_B": torch.full((4, 1), 2.0), "enc.0.q.residual_A": torch.full((1, 5), 3.0)}
    found = effective_delta(STATE | residual, "enc.0.q", 4.0)
    assert torch.allclose(found, effective_delta(STATE, "enc.0.q", 4.0) + 4.0 * 6.0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda u: u.pop("enc.0.q.lora_B"), "is missing"),
        (lambda u: u.update({"extra.lora_B": torch.zeros(1)}), "was not asked for"),
        (lambda u: u.update({"enc.0.q.lora_B": torch.zeros(2, 4)}), "shape"),
        (lambda u: u.update({"enc.0.q.lora_B": torch.zeros(4, 2, dtype=torch.float64)}), "dtype"),
        (lambda u: u["enc.0.q.lora_B"].__setitem__((0, 0), float("nan")), "NaN"),
        (lambda u: u["enc.0.q.lora_B"].__setitem__((0, 0), float("-inf")), "NaN or infinite"),
    ],
)
def test_unusable_updates_are_named(change, expected: str):
    names = ["enc.0.q.lora_B", "head.classifier.weight"]
    update = {name: STATE[name].clone() for name in names}
    assert check_update(update, STATE, names) is None
    change(update)
    assert expected in (check_update(update, STATE, names) or "")


def test_digest_sees_values_names_and_shapes_but_not_order():
    reordered = dict(reversed(list(STATE.items())))
    assert digest(STATE) == digest(reordered)
    changed = {**STATE, "head.classifier.weight": torch.ones(4, 3)}
    assert digest(changed) != digest(STATE)
    assert digest({**STATE, "head.classifier.weight": torch.ones(12)}) != digest(STATE), "the same bytes"
    nudged = {**STATE, "head.classifier.weight": torch.nextafter(torch.ones(3, 4), torch.full((3, 4), 2.0))}
    assert digest(nudged) != digest(STATE)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_wire_round_trip_is_exact_to_the_wire_dtype(dtype: str, width: int):
    arrays = to_wire(STATE, dtype)
    assert sum(a.nbytes for a in arrays.values()) == nbytes(STATE, dtype) == width * (10 + 8 + 12)
    back = from_wire(arrays, dtype)
    wanted = torch.float32 if dtype == "float32" else torch.bfloat16
    for name, value in STATE.items():
        assert back[name].dtype == torch.float32
        assert torch.equal(back[name], value.to(wanted).float())
    back["head.classifier.weight"][0, 0] = 7  # its own memory
    assert STATE["head.classifier.weight"][0, 0] == 1


def test_wire_refuses_other_dtypes():
    with pytest.raises(ValueError, match="float64"):
        from_wire({"a": np.zeros(2)}, "float32")
    with pytest.raises(ValueError, match="wire_dtype"):
        to_wire(STATE, "float16")
