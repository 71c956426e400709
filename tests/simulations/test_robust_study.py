"""The study of hostile clients in a tiny form: what the script measures is what the rules promise."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fedlab.config import RunConfig

SCRIPT = Path(__file__).resolve().parents[2] / "simulations" / "benchmarks" / "robust.py"
TINY = [
    *("data.clients=10", "data.test_fraction=0.2", "lora.layers_to_transform=[1]"),
    *("train.steps=10", "train.batch_size=24", "train.physical_batch=24", "train.lr=0.3", "train.head_lr=1.0"),
]


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("robust_study", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["robust_study"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def accuracies(study: ModuleType, toml: str, tmp_path: Path, *args: str) -> dict[tuple[str, str], dict]:
    (tmp_path / "tiny.toml").write_text(toml)
    sets = [part for override in TINY for part in ("--set", override)]
    out = tmp_path / "cells.json"
    cells = study.main(["--config", str(tmp_path / "tiny.toml"), *sets, *args, "--json", str(out)])
    assert json.loads(out.read_text(encoding="utf-8")) == cells
    return {(cell["rule"], cell["attack"]): cell for cell in cells}


def test_robust_rules_stay_near_the_clean_result_and_the_mean_does_not(
    study: ModuleType, learnable_toml: str, tmp_path: Path
):
    """Three rounds, three of ten clients hostile.

    The median and Krum under sign flips; and the mean, once NaN updates are excluded.
    """
    rules = ["mean", "coordinate_median", "krum"]
    cells = accuracies(study, learnable_toml, tmp_path, "--rules", *rules, "--attacks", "none", "sign_flip")
    assert len(cells) == 6
    clean = cells["mean", "none"]["accuracy"]
    assert clean > 0.7, "three balanced classes: the study has something to lose"
    lost = {rule: clean - cells[rule, "sign_flip"]["accuracy"] for rule in rules}
    assert lost["mean"] > 0.25
    assert abs(lost["coordinate_median"]) < lost["mean"] / 2
    assert abs(lost["krum"]) < lost["mean"] / 2
    assert all(cell["excluded"] == 0 for cell in cells.values())
    ((_, nan),) = accuracies(study, learnable_toml, tmp_path, "--rules", "mean", "--attacks", "nan").items()
    assert nan["excluded"] == 9, "three clients in three rounds"
    assert nan["accuracy"] > clean - 0.15


def test_label_flippers_train_on_flipped_labels_and_nobody_else_does(study: ModuleType, learnable_toml: str):
    setting = study.open_setting(RunConfig.parse(learnable_toml, TINY), 3)
    data = setting.session.data
    assert (setting.flipped.tokens.labels == 2 - data.tokens.labels).all()
    assert len(set(setting.hostile)) == 3
    honest, poisoned = (study.received(setting, name, setting.start, 1) for name in ("none", "label_flip"))
    differ = {
        client
        for client in data.clients
        if any(not torch.equal(honest[client][n], poisoned[client][n]) for n in setting.names)
    }
    assert differ == set(setting.hostile)


def test_frozen_layers_run_once_per_text_and_change_nothing(study: ModuleType, learnable_toml: str):
    """Within the context the first layer is not run again for a text that it has seen; after it all is as before."""
    config = RunConfig.parse(learnable_toml, TINY)
    setting = study.open_setting(config, 3)
    model, data, calls = setting.session.model, setting.session.data, []

    def trained() -> dict[str, torch.Tensor]:
        return study.train_client(model, data, data.clients[0], setting.start, setting.names, config, 1, None).update

    handle = model.module.base_model.model.encoder.encoder.layer[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        plain, often = trained(), len(calls)
        with study.frozen_layers_once(model):
            first, once = trained(), len(calls)
            again = trained()
            assert once > often > 0
            assert len(calls) == once
        after = trained()
        assert len(calls) == once + often
    finally:
        handle.remove()
    for n in plain:
        assert torch.equal(first[n], again[n])
        assert torch.equal(after[n], plain[n])
        assert float((first[n] - plain[n]).norm()) < 1e-4 * float(plain[n].norm())


def test_rules_are_told_what_they_can_stand(study: ModuleType):
    """Ten clients of which three may be hostile: Bulyan would need 15, so it is told of one; a mean of seven needs no
    trimming.
    """
    generator = torch.Generator().manual_seed(0)
    updates = {f"client-{k}": {"head.w": torch.randn(5, generator=generator)} for k in range(10)}
    weights = dict.fromkeys(updates, 1.0)
    for rule, options in (("bulyan", {"byzantine": 1}), ("krum", {"byzantine": 3}), ("trimmed_mean", {"trim": 0.3})):
        expected = study.RULES[rule](updates, weights, **options)["head.w"]
        assert torch.equal(study.aggregate(rule, updates, 3)["head.w"], expected)
    few = {client: updates[client] for client in list(updates)[:7]}
    mean = study.aggregate("mean", few, 0)["head.w"]
    assert torch.allclose(study.aggregate("trimmed_mean", few, 0)["head.w"], mean)
    assert torch.allclose(mean, torch.stack([u["head.w"] for u in few.values()]).mean(0), atol=1e-6)


def test_several_seeds_make_one_table(study: ModuleType, capsys: pytest.CaptureFixture[str]):
    cells = [
        {"rule": "mean", "attack": name, "seed": seed, "accuracy": accuracy, "excluded": 0, "ended": ended}
        for name, seed, accuracy, ended in (("none", 1, 0.5, None), ("none", 2, 0.7, None), ("nan", 1, 0.25, 2))
    ]
    study.print_table(cells, ["mean"], ["none", "nan"])
    assert capsys.readouterr().out.splitlines()[-1] == "| mean | 60.0 ± 14.1 | 25.0 † |"
