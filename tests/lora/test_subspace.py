"""``open_rows`` against Gram–Schmidt by projectors, and its refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlab.lora.subspace import open_rows


def draw(rows: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept_rows(k: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(draw(k, n, seed).mT)[0].mT if k else torch.zeros(0, n, dtype=torch.float64)


def reference(kept: np.ndarray, candidates: np.ndarray, count: int) -> np.ndarray:
    """Row by row: what least squares on all rows so far leaves of a candidate, to length one."""
    rows = list(kept)
    for candidate in candidates:
        if len(rows) == len(kept) + count:
            break
        candidate = candidate / np.abs(candidate).max() if candidate.any() else candidate
        rest = candidate
        if rows:
            basis = np.array(rows).T  # [n, so far]
            rest = candidate - basis @ np.linalg.lstsq(basis, candidate, rcond=None)[0]
        if np.linalg.norm(rest) > 1e-6 * np.linalg.norm(candidate):
            rows.append(rest / np.linalg.norm(rest))
    return np.array(rows[len(kept) :]).reshape(-1, kept.shape[1])


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), st.data())
def test_opened_rows_are_gram_schmidt_in_order(n: int, data: st.DataObject):
    k = data.draw(st.integers(0, n))
    count = data.draw(st.integers(0, n - k))
    scale = data.draw(st.sampled_from([1e-200, 1e-30, 1.0, 1e20, 1e200]))
    kept, candidates = (
        kept_rows(k, n),
        draw(count + 2, n, data.draw(st.integers(100, 10**6))),
    )  # not the seed of the kept rows
    found = open_rows(kept, scale * candidates, count)
    assert found.shape == (count, n)
    assert found.dtype == torch.float64
    together = torch.cat([kept, found])
    assert float((together @ together.mT - torch.eye(k + count, dtype=torch.float64)).norm()) < 1e-12
    assert np.allclose(found.numpy(), reference(kept.numpy(), candidates.numpy(), count), atol=1e-8)


def test_candidates_that_add_nothing_are_skipped():
    kept = kept_rows(2, 6)
    fresh = draw(2, 6, 5)
    useless = torch.stack([kept[0], 2 * kept[1] - kept[0], torch.zeros(6, dtype=torch.float64), fresh[0]])
    candidates = torch.cat([useless[:3], fresh[:1], useless[3:], kept[:1] + 1e-8 * fresh[1:], fresh[1:]])
    found = open_rows(kept, candidates, 2)
    assert np.allclose(found.numpy(), reference(kept.numpy(), fresh.numpy(), 2), atol=1e-12)


def test_a_candidate_just_above_the_threshold_opens_a_clean_direction():
    """What is left of it is a millionth of its length: one pass of Gram–Schmidt would leave 1e-10 of the kept rows in
    it.
    """
    kept = kept_rows(3, 40)
    new = draw(1, 40, 8)
    found = open_rows(kept, kept[:1] + 1e-5 * new, 1)
    assert float((kept @ found.mT).abs().max()) < 1e-15


def test_rows_that_fill_the_space():
    kept = kept_rows(3, 5)
    found = open_rows(kept, torch.eye(5, dtype=torch.float64), 2)
    whole = torch.cat([kept, found])
    assert np.allclose((whole.mT @ whole).numpy(), np.eye(5), atol=1e-12)
    assert open_rows(kept, torch.eye(5), 0).shape == (0, 5)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_dtypes_follow_what_is_kept(dtype: torch.dtype, wanted: torch.dtype):
    kept = torch.eye(8)[:2].to(dtype)
    found = open_rows(kept, draw(4, 8), 3)
    assert found.dtype == wanted
    whole = torch.cat([kept.to(wanted), found]).double()
    assert float((whole @ whole.mT - torch.eye(5)).abs().max()) < 1e-6


def test_deterministic_and_without_side_effects():
    kept, candidates = kept_rows(2, 9), draw(5, 9, 3)
    copies = kept.clone(), candidates.clone()
    assert torch.equal(open_rows(kept, candidates, 4), open_rows(kept, candidates, 4))
    assert torch.equal(kept, copies[0])
    assert torch.equal(candidates, copies[1])


def test_more_directions_than_there_are_is_refused():
    with pytest.raises(ValueError, match="3 directions beside 3 are more than the 5 there are; lower the rank"):
        open_rows(kept_rows(3, 5), draw(9, 5), 3)


def test_too_few_candidates_are_refused_with_the_numbers():
    kept = kept_rows(2, 7)
    with pytest.raises(ValueError, match="3 candidates opened 1 new directions, 2 are needed; offer more"):
        open_rows(kept, torch.cat([kept, draw(1, 7, 4)]), 2)
    with pytest.raises(ValueError, match="0 candidates opened 0 new directions, 1 are needed"):
        open_rows(kept, draw(0, 7), 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_rows_are_refused_by_name(bad: float):
    for where, name in enumerate(("kept", "candidates")):
        rows = [kept_rows(2, 6), draw(3, 6)]
        rows[where][1, 2] = bad
        with pytest.raises(ValueError, match=f"{name} holds NaN or infinite entries"):
            open_rows(*rows, 1)


def test_negative_counts_and_other_lengths_are_refused():
    with pytest.raises(ValueError, match="count must be >= 0, got -1"):
        open_rows(kept_rows(2, 6), draw(3, 6), -1)
    with pytest.raises(ValueError, match="candidates have length 5, want that of the kept rows, 6"):
        open_rows(kept_rows(2, 6), draw(3, 5), 1)
