"""Configuration: what is rejected, and in which words."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedlab.config import RunConfig
from fedlab.errors import ConfigError

MINIMAL = "[run]\nrounds = 2\n[lora]\nrank = 4\nalpha = 8\n[train]\nlr = 0.1\nsteps = 1\n"


def error_of(*overrides: str, text: str = MINIMAL) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse(text, overrides)
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


def test_minimal_configuration_round_trips():
    config = RunConfig.parse(MINIMAL)
    assert RunConfig.parse(config.to_toml()) == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=3", "did you mean train.steps?"),
        ("run.round=3", "did you mean run.rounds?"),
        ("traim.lr=3", "did you mean train?"),
        ("data.partition={kind='iid', alpa=1}", "did you mean data.partition.alpha?"),
        ("lora.rank=0", "lora.rank: must be greater than 0, got 0"),
        ("run.fraction=1.5", "run.fraction"),
        ("train.lr=-1", "train.lr"),
        ("run.seed='x'", "run.seed"),
        ("data.partition={kind='dirichlet'}", "needs alpha"),
        ("run.min_clients=7", "run.min_clients = 7 can never be reached"),
        ("train.epochs=1", "exactly one of steps and epochs"),
        ("train.lr=nan", "train.lr"),
    ],
)
def test_bad_values_name_the_key_and_the_fix(override: str, expected: str):
    assert expected in error_of(override)


@pytest.mark.parametrize(
    ("override", "new"),
    [
        ("run.cache_prefix=true", "run.cache_hidden_states"),
        ("strategy.gram={cohort=3}", "strategy.gram.min_clients"),
        ("model.task='sequence-classification'", "objective.name"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(override: str, new: str):
    assert f"is now called {new}" in error_of(override)


def test_several_problems_are_told_at_once():
    found = error_of("run.min_clients=7", "run.checkpointing=true", "train.gradients=hooks", "run.sampling=poisson")
    assert "run.sampling" in found
    assert "run.min_clients" in found
    assert "run.checkpointing" in found


@pytest.mark.parametrize("name", ["../../../x", "a/b", "", ".hidden", "server/", "a b"])
def test_a_run_is_named_as_a_directory_may_be(name: str):
    assert "run.name" in error_of(f"run.name='{name}'")


def test_a_key_of_another_kind_of_partition_is_refused():
    found = error_of("data.partition={kind='iid', alpha=0.5}")
    assert 'alpha belongs to kind = "dirichlet"' in found


def test_missing_alpha_is_named():
    assert "lora.alpha is missing" in error_of(text=MINIMAL.replace("alpha = 8\n", ""))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["privacy.unit='example'", "privacy.clip=1.0"], "exactly one of epsilon and sigma"),
        (
            ["privacy.unit='example'", "privacy.epsilon=1.0", "privacy.sigma=1.0", "privacy.clip=1.0"],
            "exactly one of epsilon and sigma",
        ),
        (
            ["privacy.unit='example'", "privacy.epsilon=-1", "privacy.clip=1.0"],
            "privacy.epsilon: must be greater than 0, got -1",
        ),
        (["privacy.unit='example'", "privacy.epsilon=1.0"], "clip is missing"),
        (["privacy.epsilon=1.0"], 'unit = "none" adds no noise'),
    ],
)
def test_half_a_privacy_promise_is_refused(overrides: list[str], expected: str):
    assert expected in error_of(*overrides)


@pytest.mark.parametrize("override", ["train.lr", "lr=3", "train.=3", "train.lr=[1"])
def test_malformed_overrides(override: str):
    assert "--set" in error_of(override)


def test_overrides_are_toml_and_bare_words_are_strings():
    config = RunConfig.parse(
        MINIMAL, ["run.name=abc", "train.lr=0.5", "lora.target_modules=['q', 'v']", "run.tensorboard=true"]
    )
    assert (config.run.name, config.train.lr, config.lora.target_modules, config.run.tensorboard) == (
        "abc",
        0.5,
        ("q", "v"),
        True,
    )
    config = RunConfig.parse(MINIMAL, ["run.ray_address=10.0.0.7:6379", "run.backend=ray", "data.path=~/texts/a_b.csv"])
    assert (config.run.ray_address, config.data.path) == ("10.0.0.7:6379", "~/texts/a_b.csv")


def test_a_missing_file_and_bad_toml_are_configuration_errors(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        RunConfig.load(tmp_path / "none.toml")
    assert "not valid TOML" in error_of(text="[run")


@pytest.mark.parametrize(
    ("clients", "fraction", "rounds", "expected"),
    [(6, 1.0, 10, 10), (6, 0.5, 100, 50), (5, 0.4, 7, 3), (3, 0.34, 10, 4)],
)
def test_default_cap_is_what_balanced_sampling_needs(clients: int, fraction: float, rounds: int, expected: int):
    config = RunConfig.parse(MINIMAL, [f"data.clients={clients}", f"run.fraction={fraction}", f"run.rounds={rounds}"])
    assert config.participations == expected


@pytest.mark.parametrize(
    "preset", ["quickstart", "wordnet", "glue", "continual-wordnet", "instruct", "instruct-wordnet"]
)
def test_presets_are_valid(preset: str, request: pytest.FixtureRequest):
    config = RunConfig.load(request.config.rootpath / "simulations" / f"{preset}.toml")
    from fedlab.run.launch import check_strategy

    check_strategy(config)


def test_importing_fedlab_and_rejecting_a_key_imports_nothing_heavy():
    code = (
        "import sys, fedlab\n"
        "try: fedlab.RunConfig.parse('[run]\\nround = 1')\n"
        "except fedlab.ConfigError: pass\n"
        "print([m for m in ('torch', 'flwr', 'ray', 'transformers', 'peft', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
