"""GLUE's scores against scikit-learn, and in a run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef

import fedlab
from fedlab.config import RunConfig
from fedlab.evaluate.glue import f1, matthews

pairs = st.integers(1, 4).flatmap(
    lambda most: st.lists(st.tuples(st.integers(0, most), st.integers(0, most)), min_size=1, max_size=60)
)


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(pairs)
def test_scores_are_scikit_learns(drawn: list[tuple[int, int]]):
    labels, predicted = (np.array(column) for column in zip(*drawn, strict=True))
    assert matthews(predicted, labels) == pytest.approx(matthews_corrcoef(labels, predicted))
    assert f1(predicted, labels) == pytest.approx(f1_score(labels == 1, predicted == 1, zero_division=0))


def test_a_run_is_scored_as_glue_does_and_for_calibration(learnable_toml: str, tmp_path: Path):
    judges = "evaluate.evaluators=['classification', 'glue', 'calibration']"
    config = RunConfig.parse(learnable_toml, [judges, "run.rounds=1", "evaluate.clients=never"])
    scores = fedlab.simulate(config, tmp_path / "run", quiet=True).result["scores"]
    assert list(scores) == ["accuracy", "macro_f1", "loss", "matthews", "f1", "ece", "brier"]
    assert scores["f1"] is None, "of three labels none is the positive one"
    assert all(math.isfinite(value) for name, value in scores.items() if name != "f1")
