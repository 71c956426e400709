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


SHARED = [
    "privacy={unit='example', epsilon=6.0, clip=1.0, survivors=4}", "train={steps=1, lr=0.1, sampling_rate=0.1}",
    "data.clients=6",
]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("privacy.unit=client", 'for unit = "example"'),
        ("privacy.unit=none", "adds no noise"),
        ("privacy.colluding=4", "must be below survivors = 4"),
        ("privacy={unit='example', sigma=1.0, clip=1.0, colluding=1}", "colluding belongs to shared noise"),
        ("privacy={unit='example', sigma=1.0, clip=1.0, masked=true}", "masked belongs to shared noise"),
        ("privacy.survivors=3", "at least 4"),
        ("privacy.survivors=7", "at most 6"),
        ("privacy.colluding=2", "at least 5"),
        ("run.fraction=0.5", "at most 3"),
        ("run.fraction=0.1", "raise run.fraction or data.clients"),
        ("privacy.survivors=1", "give at least 2"),
        ("privacy={unit='example', sigma=1e7, clip=1.0, survivors=4}", "privacy.sigma = 1e+07"),
        ("privacy={unit='example', sigma=1e-6, clip=1.0, survivors=4}", "privacy.sigma = 1e-06"),
        ("train={steps=1, lr=0.1}", "train.sampling_rate is missing"),
        ("train.sampling_rate=1.5", "train.sampling_rate"),
        ("train={epochs=1.0, lr=0.1, sampling_rate=0.1}", "give steps in their place"),
        ("train.steps=2", "set train.steps = 1"),
        ("train.optimizer=adamw", "train.optimizer"),
        ("train.momentum=0.9", "train.momentum"),
        ("train.weight_decay=0.1", "train.weight_decay"),
        ("train.prox=0.1", "train.prox"),
        ("clients.lr={'50%'=2.0}", "clients.lr"),
        ("strategy.weights=uniform", "strategy.weights"),
        ("strategy.robust={rule='median'}", "strategy.robust"),
        ("run.sampling=poisson", "run.sampling"),
    ],
)
def test_what_shared_noise_cannot_be_is_refused(override: str, expected: str):
    assert expected in error_of(*SHARED, override)


def test_shared_noise_and_what_belongs_to_it():
    config = RunConfig.parse(MINIMAL, [*SHARED, "privacy.colluding=1", "privacy.masked=true"])
    assert config.shared_noise
    assert not RunConfig.parse(MINIMAL).shared_noise
    assert config.train.rate(10) == config.train.rate(10**6) == 0.1
    assert RunConfig.parse(config.to_toml()) == config


def test_a_sampling_rate_without_example_level_dp_is_refused():
    assert "train.sampling_rate" in error_of("train={steps=1, lr=0.1, sampling_rate=0.1}")


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


@pytest.mark.parametrize("name", ["general", "finance", "medical", "code"])
def test_flowertunes_federations_are_valid_up_to_the_first_download(name: str, request: pytest.FixtureRequest):
    """What is missing here is a GPU, what makes 4 bits, and the hub; nothing else is wrong with them."""
    from fedlab.run.launch import check

    config = RunConfig.load(request.config.rootpath / "simulations" / "flowertune" / f"{name}.toml")
    with pytest.raises(ConfigError) as caught:
        check(config)
    missing = ("needs the package bitsandbytes", "run.gpus_per_node", "on the Hub", "from the hub", "load from hub")
    found = [line for line in str(caught.value).splitlines() if not line.endswith("nothing was started")]
    assert found
    assert [problem for problem in found if not any(words in problem for words in missing)] == []


def test_importing_fedlab_and_rejecting_a_key_imports_nothing_heavy():
    code = (
        "import sys, fedlab\n"
        "try: fedlab.RunConfig.parse('[run]\\nround = 1')\n"
        "except fedlab.ConfigError: pass\n"
        "print([m for m in ('torch', 'flwr', 'ray', 'transformers', 'peft', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
