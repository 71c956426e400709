"""Whole runs in one process: what is written, what is equal, what fails and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fedlab
from fedlab.config import RunConfig


def simulate(toml: str, out: Path, *overrides: str) -> fedlab.Run:
    return fedlab.simulate(RunConfig.parse(toml, overrides), out, quiet=True)


def lines(run: fedlab.Run, phase: str) -> list[dict]:
    found = (json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["phase"] == phase]


def test_a_run_leaves_what_the_design_promises(tiny_toml: str, tmp_path: Path):
    run = simulate(tiny_toml, tmp_path / "run")
    assert run.result["status"] == "completed"
    for name in (
        "run.toml",
        "environment.json",
        "result.json",
        "metrics.jsonl",
        "partition.json",
        "log.txt",
        "report.html",
    ):
        assert (run.path / name).is_file(), name
    assert (run.path / "adapter" / "adapter_model.safetensors").is_file()
    assert 0 < run.result["epsilon"] < 100
    assert run.result["epsilon"] == max(c["epsilon"] for c in run.result["clients"].values())
    assert all(c["participations"] == 3 for c in run.result["clients"].values())
    assert [line["round"] for line in lines(run, "train")] == [1, 2, 3]
    assert [line["round"] for line in lines(run, "evaluate")] == [0, 1, 2, 3]
    assert all(line["loss"] is None for line in lines(run, "train")), "training loss leaves a client under DP"
    assert run.result["bytes_up"] > 0
    assert run.result["overhead_seconds_per_round"] < run.result["seconds_per_round"]


@pytest.mark.parametrize(
    "strategy",
    [
        *("fedavg", "fedsvd", "fedsvd refresh={every=2,keep=1}", "head"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("ffa", "fedex", "flora", "flora train=B", "flexlora", "rolora")
        ),
    ],
)
def test_every_strategy_learns_without_dp(strategy: str, learnable_toml: str, tmp_path: Path):
    name, *options = strategy.split(" ")
    settings = [f"strategy.name={name}", *(f"strategy.{option}" for option in options)]
    run = simulate(learnable_toml, tmp_path / "run", *settings, "run.rounds=6", "train.steps=8", "train.lr=0.3")
    first, last = lines(run, "evaluate")[0], lines(run, "evaluate")[-1]
    assert last["scores"]["loss"] < 0.8 * first["scores"]["loss"]
    assert run.result["epsilon"] == "no DP"
    assert all(c["epsilon"] == "no DP" for c in run.result["clients"].values())
    assert all(line["epsilon"] == "no DP" and line["loss"] is not None for line in lines(run, "train"))


def test_same_seed_same_bits_for_any_number_of_nodes_and_another_seed_differs(tiny_toml: str, tmp_path: Path):
    runs = [simulate(tiny_toml, tmp_path / f"{i}", *o) for i, o in enumerate([[], ["run.nodes=3"], ["run.seed=4"]])]
    digests = [run.result["adapter_digest"] for run in runs]
    assert digests[0] == digests[1] != digests[2]


def test_partial_participation_respects_the_cap(tiny_toml: str, tmp_path: Path):
    run = simulate(tiny_toml, tmp_path / "run", "run.fraction=0.34", "run.rounds=6")
    assert sorted(c["participations"] for c in run.result["clients"].values()) == [2, 2, 2]
    assert run.result["status"] == "completed"


def test_a_run_ends_when_nobody_may_take_part_any_more(tiny_toml: str, tmp_path: Path):
    run = simulate(tiny_toml, tmp_path / "run", "privacy.participations=2", "run.rounds=5")
    assert (run.result["status"], run.result["rounds"]) == ("budget-exhausted", 2)
    assert (run.path / "adapter").is_dir()


def test_calibrated_sigma_spends_at_most_epsilon(tiny_toml: str, tmp_path: Path):
    text = tiny_toml.replace("sigma = 1.0", "epsilon = 4.0")
    run = simulate(text, tmp_path / "run")
    spent = [c["epsilon"] for c in run.result["clients"].values()]
    assert all(3.9 < e <= 4.0 for e in spent)


@pytest.mark.parametrize("strategy", ["fedsvd", "fedex", "flora"])
def test_adapter_loads_with_peft_and_scores_the_same(strategy: str, tiny_toml: str, tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from fedlab.session import open_session

    settings = [f"strategy.name={strategy}", "privacy={unit='none'}", "run.rounds=4", "train.steps=8"]
    run = simulate(tiny_toml, tmp_path / "run", *settings)
    config = RunConfig.load(run.path / "run.toml")
    base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=3)
    model = PeftModel.from_pretrained(base, run.path / "adapter").eval()
    data = open_session(config.to_toml()).data
    batch = data.tokens.batch(data.test, 0)
    with torch.no_grad():
        predicted = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.argmax(-1)
    accuracy = float((predicted == batch["labels"]).double().mean())
    assert accuracy == pytest.approx(run.result["scores"]["accuracy"], abs=1e-12)


def test_resume_gives_the_bits_of_an_unbroken_run(tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = ["run.rounds=4", "strategy.refresh={every=1}"]  # with a residual in the state
    whole = simulate(tiny_toml, tmp_path / "whole", *settings)
    import strategies.server.loop as loop

    original = loop.Rounds._round

    def interrupted(self: loop.Rounds, number: int) -> bool:
        if number == 3:
            raise KeyboardInterrupt
        return original(self, number)

    monkeypatch.setattr(loop.Rounds, "_round", interrupted)
    with pytest.raises(fedlab.Interrupted, match="fedlab resume"):
        simulate(tiny_toml, tmp_path / "broken", *settings)
    assert json.loads((tmp_path / "broken" / "result.json").read_text())["status"] == "interrupted"
    monkeypatch.undo()
    resumed = fedlab.resume(tmp_path / "broken", quiet=True)
    for key in ("adapter_digest", "scores", "epsilon", "bytes_up", "clients"):
        assert resumed.result[key] == whole.result[key], key


@pytest.mark.parametrize(("noise", "rounds"), [("seeded", 3), ("secure", 2)])
def test_a_round_that_was_cut_off_is_charged(
    noise: str, rounds: int, tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Cut off when the clients had trained: the interrupted result counts it; with new noise the resumed run has a
    round less left.
    """
    from strategies.server.messages import Messenger

    original = Messenger.train

    def cut_off(self, order, *args):
        outcome = original(self, order, *args)
        if order.number == 2:
            raise KeyboardInterrupt
        return outcome

    monkeypatch.setattr(Messenger, "train", cut_off)
    with pytest.raises(fedlab.Interrupted):
        simulate(tiny_toml, tmp_path / "run", f"privacy.noise={noise}")
    interrupted = json.loads((tmp_path / "run" / "result.json").read_text())
    monkeypatch.undo()
    two = simulate(tiny_toml, tmp_path / "two", "run.rounds=2").result
    assert interrupted["epsilon"] == pytest.approx(two["epsilon"], rel=1e-9)
    resumed = fedlab.resume(tmp_path / "run", quiet=True).result
    whole = simulate(tiny_toml, tmp_path / "whole").result
    assert (resumed["rounds"], resumed["status"]) == (rounds, "completed" if rounds == 3 else "budget-exhausted")
    assert resumed["epsilon"] == pytest.approx(whole["epsilon"], rel=1e-9)


def test_a_delta_that_promises_nothing_ends_with_exit_code_3_before_anything_starts(tiny_toml: str, tmp_path: Path):
    with pytest.raises(fedlab.PrivacyError, match="publishing a record outright") as caught:
        simulate(tiny_toml, tmp_path / "run", "privacy.delta=0.5")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "run").exists()


def test_nothing_is_overwritten(tiny_toml: str, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("x")
    with pytest.raises(fedlab.ConfigError, match="not empty"):
        simulate(tiny_toml, tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["strategy.name=fedsdv"], "did you mean fedsvd"),
        (["strategy.perod=2"], "did you mean strategy.period"),
        (["strategy.period=0"], "strategy.period"),
        (["model.name=./nowhere"], "not a directory"),
        (["data.path='/nowhere.csv'"], "no such file"),
        (["data.label=topik"], "it has text, topic, site"),
        (["data.clients=400"], "fewer clients"),
        (["lora.target_modules=['quary']"], "'quary' matches no linear module"),
        (["lora.layers_to_transform=[7]"], "no adapted module in layer 7"),
        (["lora.rank=33"], "lora.rank = 33 exceeds"),
        (["run.device=cuda"], "no GPU"),
        (["privacy.unit=client"], 'set strategy.weights = "uniform"'),
        (["run.sampling=poisson"], "amplifies client-level DP only"),
    ],
)
def test_impossible_runs_end_with_exit_code_2(overrides: list[str], expected: str, tiny_toml: str, tmp_path: Path):
    if "cuda" in overrides[0] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(fedlab.ConfigError, match=expected.replace("(", r"\(")):
        simulate(tiny_toml, tmp_path / "run", *overrides)


def test_diverging_clients_are_excluded_and_the_run_fails_loudly(tiny_toml: str, tmp_path: Path):
    with pytest.raises(fedlab.RunFailed, match="diverged"):
        simulate(tiny_toml, tmp_path / "run", "privacy={unit='none'}", "train.lr=1e38", "train.steps=6")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert "usable updates" in result["reason"]


def test_a_run_cut_off_after_its_seal_can_still_be_resumed(
    tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The keys of its ledgers go last of all."""
    from fedlab.privacy.audit.run import audit_run
    from strategies import app

    real, calls = app.write_statement, []

    def broken(*args: object) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(app, "write_statement", broken)
    with pytest.raises(fedlab.Interrupted):
        fedlab.simulate(RunConfig.parse(tiny_toml), tmp_path / "run", quiet=True)
    resumed = fedlab.resume(tmp_path / "run", quiet=True)
    assert resumed.result["status"] == "completed"
    assert not list(resumed.path.rglob("*.pem"))
    assert not audit_run(resumed.path).findings
