"""run.dtype = "auto" is settled before the run, by what the device does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.models import hardware


@pytest.mark.parametrize(("gain", "expected"), [(2.4, "bfloat16"), (1.1, "float32"), (0.05, "float32")])
def test_auto_takes_what_is_faster(gain: float, expected: str, tiny_toml: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "bfloat16_gain", lambda device: gain)
    assert hardware.resolve_dtype(RunConfig.parse(tiny_toml, ["run.dtype=auto"])).run.dtype == expected
    assert hardware.resolve_dtype(RunConfig.parse(tiny_toml)).run.dtype == "float32"


def test_a_slow_bfloat16_is_warned_of(
    tiny_toml: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(hardware, "bfloat16_gain", lambda device: 0.05)
    with caplog.at_level(logging.WARNING, "fedlab"):
        assert hardware.resolve_dtype(RunConfig.parse(tiny_toml, ["run.dtype=bfloat16"])).run.dtype == "bfloat16"
    assert "0.05 of the speed" in caplog.text


def test_the_gain_is_measured(tiny_toml: str, tmp_path: Path):
    assert 0 < hardware.bfloat16_gain("cpu") < 100
    run = fedlab.simulate(RunConfig.parse(tiny_toml, ["run.dtype=auto", "run.rounds=1"]), tmp_path / "run", quiet=True)
    assert 'dtype = "auto"' not in (run.path / "run.toml").read_text()
