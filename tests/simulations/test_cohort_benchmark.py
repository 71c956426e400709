"""The benchmark of shared passes runs, and times three ways that do the same work."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "simulations" / "benchmarks" / "cohort.py"


def test_the_small_form_measures_all_three_ways(tiny_toml: str, tmp_path: Path):
    spec = importlib.util.spec_from_file_location("cohort_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "tiny.toml").write_text(tiny_toml)
    found = module.main(["--small", "--config", str(tmp_path / "tiny.toml"), "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text())["results"] == found
    (row,) = found.values()
    assert all(row[way] > 0 for way in module.WAYS)
    assert row["alone / together"] == row["alone"] / row["together"]
