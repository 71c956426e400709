"""Runs under shared noise: one sum per round, which fewer clients than are needed never release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import clients.train
import fedlab
from fedlab.config import RunConfig
from fedlab.errors import ConfigError, RunFailed
from fedlab.lora.state import part_of
from fedlab.models.adapters import initial_state
from fedlab.privacy.accounting import DISCRETE, Event, epsilon
from fedlab.privacy.audit.run import audit_run
from fedlab.run.checkpoint import load_checkpoint
from fedlab.run.directory import RunDirectory
from fedlab.session import open_session
from fedlab.train.local import LocalTraining
from fedlab.train.sums import sum_client

pytestmark = pytest.mark.usefixtures("drawn_once")
SHARED = ("privacy.survivors=2", "train.steps=1", "train.sampling_rate=0.2", "train.momentum=0")


def simulate(toml: str, out: Path, *overrides: str) -> fedlab.Run:
    return fedlab.simulate(RunConfig.parse(toml, [*SHARED, *overrides]), out, quiet=True)


def lines(run: Path, phase: str = "train") -> list[dict[str, Any]]:
    found = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["phase"] == phase]


def kinds(run: Path, client: str) -> list[str]:
    return [json.loads(line)["type"] for line in (run / "ledger" / f"{client}.jsonl").read_text().splitlines()]


def failing(patch: pytest.MonkeyPatch, *failures: tuple[str, int]) -> None:
    """Let clients fail in rounds, after they were charged."""
    share = clients.train._share

    def fails(current: Any, client: Any, result: Any) -> Any:
        if (client.name, current.request.round) in failures:
            raise OSError("made up")
        return share(current, client, result)

    patch.setattr(clients.train, "_share", fails)


def test_a_run_goes_to_its_end_and_its_audit_finds_nothing(tiny_toml: str, tmp_path: Path):
    run = simulate(tiny_toml, tmp_path / "run")
    assert (run.result["status"], run.result["unreleased_rounds"]) == ("completed", 0)
    assert [(line["clients"], line["released"]) for line in lines(run.path)] == [
        (["client-0", "client-1", "client-2"], True)
    ] * 3
    assert all(kinds(run.path, f"client-{i}").count("COMMIT") == 3 for i in range(3))
    assert run.result["bytes_up"] == 3 * 3 * 8 * sum(
        value.numel() for name, value in load(run.path).items() if part_of(name) in ("lora_B", "head")
    )
    assert not audit_run(run.path).findings


def load(run: Path) -> dict[str, torch.Tensor]:
    found = load_checkpoint(RunDirectory.open(run))
    assert found is not None
    return found[1]


@pytest.mark.parametrize("gradients", ["fused", "hooks"])
def test_a_round_is_one_step_on_the_pooled_examples(gradients: str, tiny_toml: str, tmp_path: Path):
    """With next to no noise: −lr·Σ clipped gradients of all clients / (q·Σ n), by the one-by-one path."""
    settings = ["privacy.sigma=1e-4", "run.rounds=1", "strategy.name=ffa", "train.head_lr=0.1", "train.lr=0.3"]
    run = simulate(tiny_toml, tmp_path / "run", *settings, f"train.gradients={gradients}")
    session = open_session((run.path / "run.toml").read_text())
    state = initial_state(session.model, session.config.lora, session.config.run.seed)
    trained = [name for name in state if part_of(name) in ("lora_B", "head")]
    total = {name: torch.zeros_like(state[name], dtype=torch.float64) for name in trained}
    for client in session.data.clients:
        training = LocalTraining(client, state, session.plan(client))
        found = sum_client(session.model, session.data, training, trained, session.config, 1)
        total = {name: total[name] + found.sums[name] for name in trained}
    expected = 0.2 * sum(session.data.size(client) for client in session.data.clients)
    after = load(run.path)
    for name in trained:
        lr = 0.1 if part_of(name) == "head" else 0.3
        noise = 20 * lr * 1e-4 / expected  # σ·C, and shares for two of three
        assert torch.allclose(after[name].double(), state[name].double() - lr * total[name] / expected, atol=noise)
        if part_of(name) == "head":
            assert not torch.allclose(after[name].double(), state[name].double(), atol=3 * noise)


def test_nodes_cohorts_and_a_resume_change_no_bit(tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one, three = (simulate(tiny_toml, tmp_path / f"{n}", f"run.nodes={n}") for n in (1, 3))
    assert one.result["adapter_digest"] == three.result["adapter_digest"]
    with monkeypatch.context() as patch:
        patch.setattr("strategies.server.loop.Rounds._train", _stopped(2))
        with pytest.raises(RunFailed, match="made up"):
            simulate(tiny_toml, tmp_path / "cut")
    again = fedlab.resume(tmp_path / "cut", quiet=True)
    assert again.result["adapter_digest"] == one.result["adapter_digest"]
    assert again.result["epsilon"] == one.result["epsilon"]
    assert not audit_run(again.path).findings


def _stopped(number: int) -> Any:
    from strategies.server.loop import Rounds

    train = Rounds._train

    def cut(self: Rounds, round_number: int) -> Any:
        outcome = train(self, round_number)
        if round_number == number:
            raise RuntimeError("made up")
        return outcome

    return cut


def test_who_does_not_answer_is_left_out_while_enough_are_there(
    tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    failing(monkeypatch, ("client-1", 2))
    run = simulate(tiny_toml, tmp_path / "run", "run.nodes=2")
    assert run.result["status"] == "completed"
    assert [line["clients"] for line in lines(run.path)][1] == ["client-0", "client-2"]
    assert list(lines(run.path)[1]["excluded"]) == ["client-1"]
    assert kinds(run.path, "client-1").count("CHARGE") == 3, "what failed was charged"
    assert run.result["clients"]["client-1"]["epsilon"] == run.result["clients"]["client-0"]["epsilon"]
    assert not audit_run(run.path).findings


def test_a_round_of_too_few_releases_nothing_and_its_charges_stand(
    tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    failing(monkeypatch, ("client-1", 2))
    run = simulate(tiny_toml, tmp_path / "run", "privacy.survivors=3", "privacy.noise=secure")
    assert (run.result["status"], run.result["unreleased_rounds"]) == ("completed", 1)
    assert [line["released"] for line in lines(run.path)] == [True, False, True]
    scores = [line["scores"] for line in lines(run.path, "evaluate")]
    assert scores[1] == scores[2] != scores[3], "the state stays"
    assert all(kinds(run.path, f"client-{i}").count("CHARGE") == 3 for i in range(3))
    said = [line["message"] for line in lines(run.path, "event")]
    assert any("round 2 released nothing: 2 clients' shares came, privacy.survivors = 3" in line for line in said)
    assert not audit_run(run.path).findings


def test_three_such_rounds_in_a_row_end_the_run(tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    failing(monkeypatch, *(("client-1", number) for number in (1, 3, 4, 5)))
    with pytest.raises(RunFailed, match=r"round 5 released nothing.*3 rounds one after another"):
        simulate(tiny_toml, tmp_path / "run", "privacy.survivors=3", "run.rounds=6")


def test_clients_of_lower_rank_add_noise_everywhere(tiny_toml: str, tmp_path: Path):
    run = simulate(tiny_toml, tmp_path / "run", "clients.rank={'67%'=1}", "strategy.name=ffa", "run.rounds=1")
    B = next(value for name, value in load(run.path).items() if name.endswith("lora_B"))
    assert bool(B.all()), "a coordinate without noise would show who trains it"


def test_the_server_s_optimiser_has_momentum_and_a_rate_for_the_head(tiny_toml: str, tmp_path: Path):
    def run(name: str, server: str) -> dict[str, torch.Tensor]:
        settings = ["strategy.name=ffa", "run.rounds=1", *([server] * bool(server))]
        return load(simulate(tiny_toml, tmp_path / name, *settings).path)

    plain, own = run("plain", ""), run("own", "strategy.server={optimizer='momentum', lr=1.0, head_lr=0.5}")
    start = initial_state(*_model_of(tmp_path / "plain"))
    for name, value in plain.items():
        moved, want = own[name] - start[name], value - start[name]
        assert torch.allclose(moved, (0.5 if part_of(name) == "head" else 1.0) * want, atol=1e-6), name


def _model_of(run: Path) -> tuple[Any, Any, int]:
    session = open_session((run / "run.toml").read_text())
    return session.model, session.config.lora, session.config.run.seed


@pytest.mark.parametrize("name", ["fedex", "flora", "flexlora", "hetlora", "lora-fair", "fedsa"])
def test_a_strategy_that_needs_each_client_s_own_is_refused(name: str, tiny_toml: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=f'privacy.survivors with strategy.name = "{name}"'):
        simulate(tiny_toml, tmp_path / "run", f"strategy.name={name}")


@pytest.mark.parametrize("name", ["fedavg", "ffa", "rolora", "head"])
@pytest.mark.slow
def test_every_linear_strategy_runs(name: str, tiny_toml: str, tmp_path: Path):
    run = simulate(tiny_toml, tmp_path / "run", f"strategy.name={name}")
    assert run.result["status"] == "completed"
    assert not audit_run(run.path).findings


@pytest.mark.parametrize("settings", [("strategy.name=rolora",), ("strategy.name=fed-sb",), ("train.head=freeze",)])
def test_rounds_that_train_a_part_of_what_was_signed(settings: tuple[str, ...], tiny_toml: str, tmp_path: Path):
    """Server and clients count the coordinates of all that is ever trained, whatever the first round trains of it."""
    run = simulate(tiny_toml, tmp_path / "run", *settings)
    assert (run.result["status"], run.result["unreleased_rounds"]) == ("completed", 0)
    audit = audit_run(run.path)
    assert not audit.findings
    assert not [note for note in audit.notes if "dimension" in note]


@pytest.mark.parametrize("strategy", ["osft", "fedsvd-continual"])
def test_a_stream_shares_noise_in_each_of_its_tasks(strategy: str, stream_toml: str, tmp_path: Path):
    toml = stream_toml.replace("energy = 0.9\nfree = 4", "")
    privacy = "privacy={unit='example', epsilon=3.0, clip=1.0, survivors=2}"
    run = simulate(toml, tmp_path / "run", privacy, f"strategy.name={strategy}", "run.rounds=2")
    assert run.result["status"] == "completed"
    assert run.result["epsilon"] <= 3
    for task in ("task-0-wet", "task-1-hard"):
        assert not audit_run(run.path / task).findings


def test_a_ledger_of_both_trust_models_says_how_it_was_counted(tiny_toml: str, tmp_path: Path):
    """Each alone, after a run under shared noise on the same ledger: discrete noise is in the sum, so RDP counts."""
    ledger = f"privacy.ledger={str(tmp_path / 'ledgers')!r}"
    simulate(tiny_toml, tmp_path / "shared", ledger, "run.rounds=1")
    alone = RunConfig.parse(tiny_toml, [ledger, "run.rounds=1"])
    run = fedlab.simulate(alone, tmp_path / "alone", quiet=True)
    n = json.loads((run.path / "ledger" / "client-0.jsonl").read_text().splitlines()[0])["n"]
    spent = [Event(DISCRETE, 0.2, 1.0, 1), Event("poisson", min(1.0, 16 / n), 1.0, 3)]
    assert run.result["clients"]["client-0"]["epsilon"] == pytest.approx(epsilon(spent, 1e-5))
    assert run.result["accountant"].startswith("dp-accounting RDP at integer orders")
    assert "**Accountant**: dp-accounting RDP at integer orders" in (run.path / "PRIVACY.md").read_text()
    assert not audit_run(run.path).findings
