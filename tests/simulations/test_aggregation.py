"""The benchmark of the aggregators runs in its small form, and its ways compute the same product."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "simulations" / "benchmarks" / "aggregation.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("aggregation_benchmark", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("full", [False, True])
def test_the_small_form_measures_every_table(benchmark, full: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, threads = tmp_path / "aggregation.json", torch.get_num_threads()
    arguments = ["--layers", "1", "--clients", "3", "--rank", "4", "--repeats", "1", "--small", "--json", str(out)]
    returned = benchmark.main([*arguments, *(["--full"] if full else [])])
    assert torch.get_num_threads() == threads
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found == returned
    assert found.keys() == {"settings", "whole", "modules", "aggregators"}
    assert found["whole"].keys() == {"fedsvd", "refactorize", "mean", "layer", "modules", "dense", "ratio"}
    assert found["whole"]["modules"] == 7
    assert found["whole"]["ratio"] > 0
    shapes = [(32, 32), (64, 64)] + ([(128, 128), (344, 128), (128, 344)] if full else [])
    assert [(row["m"], row["n"]) for row in found["modules"]] == shapes
    for row in found["modules"]:
        assert all(ratio > 0 for ratio in row["ratios"].values())
        assert row["errors"]["refactorize"] < 1e-6
        assert all(error < 1e-5 for error in row["errors"].values())
        assert ("dense" in row["errors"]) == (row["m"] == row["n"] < 128)
    assert found["aggregators"].keys() == set(benchmark.AGGREGATORS)
    assert all(0 < times["min"] <= times["median"] <= times["max"] for times in found["aggregators"].values())
    printed = capsys.readouterr().out
    assert all(f"| {title} |" in printed for title in benchmark.AGGREGATORS)


def test_the_dense_total_is_by_counts_or_a_lower_bound_by_cubes(benchmark, monkeypatch: pytest.MonkeyPatch):
    """With every dense SVD pretending to take its side³ seconds and everything else one."""

    def pretend(m: int, n: int, rank: int, repeats: int, generator: torch.Generator):
        return {"m": m, "n": n, "dense": {"median": min(m, n) ** 3 * max(m, n) / min(m, n)}, "ratios": {}, "errors": {}}

    monkeypatch.setattr(benchmark, "compare", pretend)
    monkeypatch.setattr(benchmark, "whole_set", lambda *_: {"fedsvd": 3.0, "refactorize": 1.0})
    monkeypatch.setattr(benchmark, "one_module", lambda *_: {})
    monkeypatch.setattr(benchmark, "report", lambda _: None)
    full, bound = (benchmark.main(["--small", "--layers", "2", *more])["whole"] for more in (["--full"], []))
    assert full["dense"] == 2 * (4 * 128**3 + 3 * 128**2 * 344)
    assert bound["dense"] == 2 * 7 * 128**3
    assert (full["ratio"], bound["ratio"]) == (full["dense"], bound["dense"])


def test_the_ways_agree_with_each_other(benchmark):
    g = torch.Generator().manual_seed(0)
    B, A = torch.randn(40, 4, generator=g), torch.randn(4, 30, generator=g)
    for way in (benchmark.by_dense, benchmark.by_lowrank, benchmark.refactorize):
        B2, A2 = way(B, A)
        assert (B2.shape, A2.shape) == ((40, 4), (4, 30))
        assert torch.allclose(B2 @ A2, B @ A, atol=1e-4)
        assert torch.allclose(A2 @ A2.mT, torch.eye(4), atol=1e-5)
