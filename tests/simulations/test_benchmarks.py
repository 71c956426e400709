"""The speed benchmarks run in their small forms, and what they print is what they measured."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import fedlab

SCRIPTS = Path(__file__).resolve().parents[2] / "simulations" / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its siblings import it by this name
    spec.loader.exec_module(module)
    return module


def test_the_small_form_measures_all_three_ways(tiny_toml: str, tmp_path: Path):
    module = script("cohort")
    (tmp_path / "tiny.toml").write_text(tiny_toml)
    found = module.main(["--small", "--config", str(tmp_path / "tiny.toml"), "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text())["results"] == found
    (row,) = found.values()
    assert all(row[way] > 0 for way in module.WAYS)
    assert row["alone / together"] == row["alone"] / row["together"]


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path):
    module = script("gpu")
    found = module.main(["--small", "--json", str(tmp_path / "gpu.json")])
    assert json.loads((tmp_path / "gpu.json").read_text())["models"].keys() == {"roberta-large", "llama-1b"}
    for model in found["models"].values():
        (figures,) = model.values()
        assert all(figures[way] > 0 for way in module.WAYS)
        assert 0 < figures["share"] < 1
        assert figures["overhead"] == figures["bare"] / figures["cohort"]


def test_the_benchmark_of_secure_sums_adds_up(capsys: pytest.CaptureFixture[str]):
    assert script("secure_sum").main(["--clients", "8", "--parameters", "100", "--dropouts", "0.2"])
    assert "client: mask 100 numbers" in capsys.readouterr().out


def test_every_row_of_the_adapter_study_is_a_run(tmp_path: Path):
    from strategies import STRATEGIES

    module = script("dp_adapter")
    args = SimpleNamespace(out=tmp_path, epsilon=6.0, survivors=6, overrides=[])
    presets = {"each alone": "quickstart.toml", "shared noise": "quickstart-shared.toml"}
    for trust in module.TRUST:
        for method in module.METHODS:
            overrides = module.overrides(args, "quickstart", method, trust, 1)
            config = fedlab.RunConfig.load(module.PRESETS / presets[trust], overrides)
            STRATEGIES[config.strategy.name].check(config)
            assert config.shared_noise == (trust == "shared noise")
            assert config.privacy.epsilon == 6.0


@pytest.mark.slow  # five processes, each with a model of its own
def test_a_step_of_a_language_model_is_measured_in_every_way(tiny_llama: Path, tmp_path: Path):
    done = subprocess.run(
        [
            *(sys.executable, str(SCRIPTS / "lm_step.py"), "--model", str(tiny_llama), "--repeats", "1"),
            *("--batch", "2", "--length", "16", "--json", str(tmp_path / "out.json")),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["seconds"].keys() == found["memory"].keys()
    assert {"stock peft, no privacy", "fedlab DP, fused", "fedlab DP, hooks"} <= found["seconds"].keys()
    assert all(value > 0 for value in found["memory"].values())


def test_the_noise_benchmark_measures_every_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "noise.json"
    found = script("noise").main(["--samples", "1000", "--repeats", "2", "--json", str(out)])
    assert json.loads(out.read_text())["million_per_second"] == found
    assert len(found) == 4
    assert all(rate > 0 for rate in found.values())
    assert capsys.readouterr().out.startswith("| source | M samples/s | of seeded |\n|---|---|---|\n| secure (")


def test_the_strategies_table_tunes_and_prints_a_row(
    tiny_toml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "tiny.toml").write_text(tiny_toml)
    module = script("wordnet_table")
    (method, *_), (privacy, *_) = module.METHODS, module.PRIVACY
    arguments = ["--config", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "runs"), "--rounds", "1"]
    arguments += ["--methods", method, "--privacy", privacy, "--rates", "0.1", "0.2", "--seeds", "2"]
    (row,) = module.main([*arguments, "--json", str(tmp_path / "rows.json")])
    assert (row["method"], row["privacy"], len(row["results"])) == (method, privacy, 2)
    assert row["rate"] in (0.1, 0.2)
    assert json.loads((tmp_path / "rows.json").read_text())[0]["method"] == method
    assert f"| {method} | {privacy} | {row['rate']:g} | " in capsys.readouterr().out


def test_ways_are_timed_in_turn_and_the_first_turn_is_not_counted():
    seen: list[str] = []
    clock = iter(range(100))
    ways = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}
    found = script("common").interleaved(ways, 2, lambda: next(clock), before=lambda way: seen.append(f"before {way}"))
    assert seen == ["before a", "a", "before b", "b"] * 3
    assert found == {"a": [1, 1], "b": [1, 1]}


def test_the_scale_benchmark_measures_rounds_memory_and_what_remains_per_client(tmp_path: Path):
    private, plain = script("scale").main(["--small", "--json", str(tmp_path / "scale.json")])
    for row in (private, plain):
        assert row["clients_per_round"] == 10
        assert row["gigabytes"] > 0.1
        assert 0 < row["overhead_ms"] / 1000 * 10 <= row["round"]
        assert row["round"] <= row["seconds"]


def test_rounds_are_summed_up_by_medians():
    module = script("rounds")
    rounds = {"cohort": [1.0, 2.0, 9.0], "flower": [6.0, 8.0, 10.0]}
    found = module.summary({way: [{"seconds": s, "examples": 40.0} for s in values] for way, values in rounds.items()})
    assert found["ways"]["cohort"]["median"] == 2
    assert found["ways"]["cohort"]["spread"] == 4
    assert found["ratios"] == {"flower / cohort": 4}


def test_the_plain_flower_app_is_fedlab_without_fedlab(tiny_toml: str, monkeypatch: pytest.MonkeyPatch):
    """Without noise and at q = 1, its client's update is that of fedlab's: the two ways that are timed do the same
    work.
    """
    import torch

    from fedlab.config import RunConfig
    from fedlab.privacy.plan import DPPlan
    from fedlab.session import open_session
    from fedlab.train.trainer import train_client

    module = script("plain_flower")
    settings = [
        "privacy={unit='example', sigma=1e-9, clip=0.3}",
        "train.batch_size=96",
        "train.steps=2",
        "train.momentum=0.5",
    ]
    config = RunConfig.parse(tiny_toml, settings)
    session = open_session(config.to_toml())
    assert session.data.size("client-0") == 96, "so that every step of both sees every example"
    model = module.make_model(config)
    data = module.data_of(config)
    mine, names = module.trained(model), {}
    for name in mine:
        short = name.removeprefix("base_model.model.").replace(".default", "")
        names[
            f"head.{short.replace('.modules_to_save', '')}"
            if "modules_to_save" in short
            else short.removesuffix(".weight")
        ] = name
    state = {n: p.detach().clone() for n, p in session.model.parameters.items()}
    for n, p in model.named_parameters():
        if "lora_A" in n:
            state[n.removeprefix("base_model.model.").replace(".default.weight", "")] = p.detach().clone()
    state |= {short: mine[long].detach().clone() for short, long in names.items()}
    before = {short: mine[long].detach().clone() for short, long in names.items()}
    seen, _ = module.fit(config, model, data, "client-0")
    assert seen == 2 * 96
    plan = DPPlan(96, 96, 2, 1e-9, 0.3, 1e-5, 1, "seeded")
    wanted = train_client(session.model, session.data, "client-0", state, list(names), config, 1, plan).update
    for short, long in names.items():
        change = mine[long].detach() - before[short]
        assert float((change - wanted[short]).norm()) < 1e-3 * float(wanted[short].norm()), short
        assert torch.isfinite(change).all()
    module._kept.clear()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_ways_run_side_by_side(tmp_path: Path):
    module = script("rounds")
    found = module.main(["--small", "--json", str(tmp_path / "rounds.json")])
    (result,) = found.values()
    assert set(result["ways"]) == set(module.WAYS)
    assert all(figures["median"] > 0 for figures in result["ways"].values())


def test_the_boundary_benchmark_times_every_step(tmp_path: Path):
    rows = script("boundary").main(["--small", "--json", str(tmp_path / "boundary.json")])
    assert len(rows) == 4
    assert all(row["seconds"] > 0 for row in rows.values())


def test_the_continual_table_tunes_and_keeps_what_is_done(
    stream_toml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config, kept = tmp_path / "stream.toml", tmp_path / "kept.json"
    config.write_text(stream_toml)
    module = script("continual_table")
    arguments = [
        "--config",
        str(config),
        "--methods",
        "full",
        "--seeds",
        "1",
        "2",
        "--rates",
        "0.1",
        "0.2",
        "--json",
        str(kept),
    ]
    arguments += ["--set", "run.rounds=1"]
    first = module.main(arguments)
    printed = capsys.readouterr().out
    assert "| full (sequential) | 0." in printed
    assert len(first["full (sequential)"]) == 2
    size = len(kept.read_text())
    assert module.main(arguments) == first
    assert len(kept.read_text()) == size


def test_plots_are_drawn_from_what_was_measured(tmp_path: Path):
    import json

    ways = {"cohort": {"median": 1.0, "spread": 0.1}, "bare": {"median": 0.9, "spread": 0.1}}
    (tmp_path / "rounds.json").write_text(json.dumps({"results": {"4": {"ways": ways}}}))
    row = {"setting": "lora.rank=4", "training": 0.5, "overhead_ms": 3.0, "clients_per_round": 100}
    (tmp_path / "scale_rank.json").write_text(json.dumps({"rows": [row]}))
    drawn = script("plots").main(tmp_path, tmp_path / "out")
    assert [path.name for path in drawn] == ["rounds.svg", "scale.svg"]
    assert all("<svg" in path.read_text() for path in drawn)


def test_curves_of_every_way_are_the_same_but_for_rounding(
    tiny_toml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "tiny.toml").write_text(tiny_toml)
    settings = ["run.backend='local'", "lora.layers_to_transform=[1]", "lora.target_modules=['query']", "train.steps=2"]
    arguments = [
        "--config",
        str(tmp_path / "tiny.toml"),
        "--rounds",
        "2",
        "--seeds",
        "1",
        "--json",
        str(tmp_path / "curves.json"),
    ]
    module = script("curves")
    found = module.main([*arguments, *(text for value in settings for text in ("--set", value))])
    assert found.keys() == module.WAYS.keys()
    assert "| accuracy % after round | 0 | 1 | 2 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "curves.json").read_text())["ways"] == found
    for row in found.values():
        assert row["seconds"] > 0
        assert 0 <= row["overhead"] < 1
        assert len(row["curves"][0]) == 3
    assert found["cohort"]["curves"] == found["sequential"]["curves"] == found["prefix cached"]["curves"]
