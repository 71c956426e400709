"""Runs in which clients differ: in rank, and in what they keep for themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fedlab
from fedlab.config import RunConfig
from fedlab.privacy.audit.run import audit_run

slow = pytest.mark.slow


def simulate(toml: str, out: Path, *overrides: str) -> fedlab.Run:
    return fedlab.simulate(RunConfig.parse(toml, overrides), out, quiet=True)


def losses(run: fedlab.Run) -> list[float]:
    found = (json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines())
    return [line["scores"]["loss"] for line in found if line["phase"] == "evaluate"]


@pytest.mark.parametrize(
    "name",
    ["fedsvd", "flexlora", "hetlora", *(pytest.param(n, marks=slow) for n in ("fedavg", "ffa", "flora", "rolora"))],
)
def test_clients_of_unequal_rank_learn_together_and_send_less(name: str, learnable_toml: str, tmp_path: Path):
    settings = [f"strategy.name={name}", "run.rounds=4", "train.steps=8", "train.lr=0.3"]
    run = simulate(learnable_toml, tmp_path / "run", *settings, "clients.rank={client-0=1, client-2=2}")
    assert losses(run)[-1] < 0.85 * losses(run)[0]
    assert [c["rank"] for c in run.result["clients"].values()] == [1, 4, 2]
    whole = simulate(learnable_toml, tmp_path / "whole", *settings, "run.rounds=1")
    assert run.result["bytes_up"] / 4 < whole.result["bytes_up"]


def test_unequal_ranks_under_dp_are_charged_like_any_other_and_give_the_same_bits_on_any_node(
    tiny_toml: str, tmp_path: Path
):
    ranks = "clients.rank={'67%'=2}"
    runs = [simulate(tiny_toml, tmp_path / f"{i}", ranks, f"run.nodes={n}") for i, n in enumerate((1, 3))]
    assert runs[0].result["adapter_digest"] == runs[1].result["adapter_digest"]
    assert sorted(c["rank"] for c in runs[0].result["clients"].values()) == [2, 2, 4]
    assert runs[0].result["epsilon"] == simulate(tiny_toml, tmp_path / "equal").result["epsilon"]
    assert not audit_run(runs[0].path).findings


def test_pruned_ranks_survive_a_resume(learnable_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = ["strategy.name=hetlora", "strategy.prune=0.5", "run.rounds=4", "train.weight_decay=0.5", "train.lr=0.3"]
    whole = simulate(learnable_toml, tmp_path / "whole", "clients.rank={client-0=3}", *settings)
    assert any(c["rank"] < 3 for c in whole.result["clients"].values()), "somebody was pruned"
    resumed = interrupted_at(
        3, learnable_toml, tmp_path / "broken", monkeypatch, "clients.rank={client-0=3}", *settings
    )
    for key in ("adapter_digest", "scores", "bytes_up", "clients"):
        assert resumed.result[key] == whole.result[key], key


@pytest.mark.parametrize("server", ["momentum", pytest.param("adam", marks=slow)])
def test_a_server_optimiser_survives_a_resume(
    server: str, tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = ["strategy.name=ffa", "run.rounds=4", f"strategy.server={{optimizer='{server}', lr=0.1}}"]
    whole = simulate(tiny_toml, tmp_path / "whole", *settings)
    resumed = interrupted_at(3, tiny_toml, tmp_path / "broken", monkeypatch, *settings)
    assert resumed.result["adapter_digest"] == whole.result["adapter_digest"]
    assert (
        simulate(tiny_toml, tmp_path / "plain", *settings[:2]).result["adapter_digest"]
        != whole.result["adapter_digest"]
    )


def test_fedsa_shares_a_alone_and_scores_every_client_with_its_own_model(learnable_toml: str, tmp_path: Path):
    settings = ["strategy.name=fedsa", "run.rounds=6", "train.steps=8", "train.lr=0.3"]
    run = simulate(learnable_toml, tmp_path / "run", *settings)
    assert run.result["scores"] is None, "there is no global model"
    assert run.result["client_scores"]["mean"] > 0.6
    A_bytes = 4 * 4 * 32 * 4  # four modules, rank 4, 32 inputs, float32
    assert run.result["bytes_up"] == 6 * 3 * A_bytes
    adapters = [
        load_file(run.path / "personal" / f"client-{i}" / "adapter" / "adapter_model.safetensors") for i in range(3)
    ]
    for name in adapters[0]:
        same = torch.equal(adapters[0][name], adapters[1][name])
        assert same == ("lora_A" in name), f"{name}: A is shared, B and the head are not"


def test_fedsa_never_sends_what_is_personal_under_dp_either(tiny_toml: str, tmp_path: Path):
    run = simulate(tiny_toml, tmp_path / "run", "strategy.name=fedsa", "run.rounds=2")
    assert run.result["bytes_up"] == 2 * 3 * 4 * 4 * 32 * 4
    assert run.result["epsilon"] > 0
    assert all(c["score"] is not None for c in run.result["clients"].values())
    assert not audit_run(run.path).findings


def test_fedsa_resumes_with_every_clients_own_part(
    learnable_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = ["strategy.name=fedsa", "run.rounds=4", "run.fraction=0.67", "train.lr=0.3"]
    whole = simulate(learnable_toml, tmp_path / "whole", *settings)
    resumed = interrupted_at(3, learnable_toml, tmp_path / "broken", monkeypatch, *settings)
    for key in ("adapter_digest", "client_scores", "clients"):
        assert resumed.result[key] == whole.result[key], key


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["strategy.name=fedsa", "evaluate.clients=never"], "no global model"),
        (
            ["strategy.name=fedsa", "privacy={unit='client', sigma=1.0, clip=1.0}", "strategy.weights=uniform"],
            "what clients keep",
        ),
        (["clients.rank={client-7=2}"], "client-7 is none of the 3 clients"),
        (["clients.rank={client-1=9}"], "exceeds lora.rank = 4"),
        (["clients.rank={client-1=0}"], "rank >= 1"),
        (["clients.lr={client-7=0.5}"], r"clients.lr: client-7 is none of the 3 clients"),
        (["clients.lr={client-1=0.0}"], "lr: client-1 must have a positive factor"),
        (["clients.lr={'60%'=0.5, '50%'=2}"], "lr: the shares add up to 110"),
        (["clients.rank={'60%'=2, '50%'=1}"], "add up to 110"),
        (["clients.rank={'50%'=2, client-1=1}"], "not both"),
        (["clients.rank={some=2}"], "some is none of the 3 clients"),
        (["clients.rank={'many%'=2}"], "no share of the clients"),
        (["strategy.name=fedex", "clients.rank={client-1=2}"], "needs equal ranks"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: list[str], reason: str, tiny_toml: str, tmp_path: Path):
    with pytest.raises(fedlab.ConfigError, match=reason):
        simulate(tiny_toml, tmp_path / "run", *settings)


def interrupted_at(number: int, toml: str, out: Path, monkeypatch: pytest.MonkeyPatch, *settings: str) -> fedlab.Run:
    """A run that is cut off when the clients of a round have trained and nothing of it is kept by the server; then
    resumed.
    """
    from strategies.server.messages import Messenger

    original = Messenger.train

    def cut_off(self, order, *args):
        outcome = original(self, order, *args)
        if order.number == number:
            raise KeyboardInterrupt
        return outcome

    monkeypatch.setattr(Messenger, "train", cut_off)
    with pytest.raises(fedlab.Interrupted):
        simulate(toml, out, *settings)
    monkeypatch.undo()
    return fedlab.resume(out, quiet=True)
