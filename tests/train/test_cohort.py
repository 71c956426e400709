"""A cohort in one pass is every client by itself: updates, losses, counts, whoever shares the pass."""

from __future__ import annotations

import pytest
import torch

from fedlab.config import RunConfig
from fedlab.errors import RunFailed
from fedlab.lora.state import State
from fedlab.models.adapters import initial_state
from fedlab.privacy.plan import DPPlan
from fedlab.seeds import random_stream
from fedlab.session import Session, open_session
from fedlab.train.cohort import train_cohort
from fedlab.train.local import LocalTraining, Trained
from fedlab.train.trainer import train_client

CLIENTS = ["client-0", "client-1", "client-2"]
PARTS = {
    "B and head": ("lora_B", "head"),
    "both and head": ("lora_A", "lora_B", "head"),
    "A": ("lora_A",),
    "head": ("head",),
}


def session_of(toml: str, *overrides: str) -> Session:
    return open_session(RunConfig.parse(toml, overrides).to_toml())


def moved_state(session: Session, seed: int = 0) -> State:
    g = torch.Generator().manual_seed(seed)
    start = initial_state(session.model, session.config.lora, 0)
    return {n: v + 0.2 * torch.randn(v.shape, generator=g) for n, v in start.items()}


def names_of(state: State, parts: tuple[str, ...]) -> list[str]:
    return [n for n in state if n.endswith(parts) or ("head" in parts and n.startswith("head."))]


def plan_of(session: Session, client: str, **change) -> DPPlan:
    values = {
        "n": session.data.size(client),
        "batch_size": 12,
        "steps": 3,
        "sigma": 1.0,
        "clip": 0.3,
        "delta": 1e-5,
        "participations": 3,
    }
    return DPPlan(**{**values, "noise": "seeded", **change})


def compare(
    session: Session, members: list[LocalTraining], names: list[str], tolerance: float = 1e-5
) -> dict[str, Trained]:
    """Both ways; the updates agree relative to each client's own, everything that is counted is equal."""
    found = train_cohort(session.model, session.data, members, names, session.config, 2)
    for m in members:
        alone = train_client(session.model, session.data, m.client, m.state, names, session.config, 2, m.plan, m.rank)
        mine = found[m.client]
        assert isinstance(mine, Trained)
        assert mine.update.keys() == alone.update.keys()
        error = sum(float((mine.update[n] - alone.update[n]).double().square().sum()) for n in names) ** 0.5
        size = sum(float(alone.update[n].double().square().sum()) for n in names) ** 0.5
        assert all(mine.update[n].shape == alone.update[n].shape for n in names)
        assert error <= tolerance * size
        assert (mine.examples, mine.steps) == (alone.examples, alone.steps)
        assert mine.clip_fraction == pytest.approx(alone.clip_fraction, nan_ok=True)
        assert mine.loss == pytest.approx(alone.loss, rel=1e-5, nan_ok=True)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("private", [False, True], ids=["plain", "dp"])
@pytest.mark.parametrize("model", ["tiny_bert", "tiny_gpt2", "tiny_sentence_encoder"])
def test_equal_to_one_client_at_a_time(
    model: str, private: bool, parts: str, tiny_toml: str, tiny_bert, request: pytest.FixtureRequest
):
    toml = tiny_toml.replace(str(tiny_bert), str(request.getfixturevalue(model)))
    session = session_of(
        toml,
        "lora.target_modules='all-linear'",
        "train.momentum=0.5",
        "train.lr=0.05",
        "train.head_lr=0.2",
        "train.prox=0.1",
    )
    state = moved_state(session)
    members = [LocalTraining(c, state, plan_of(session, c) if private else None) for c in CLIENTS]
    compare(session, members, names_of(state, PARTS[parts]))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("length", ["train.steps=4", "train.epochs=2"])
def test_optimisers_and_clients_of_unequal_length(optimizer: str, length: str, tiny_toml: str):
    momentum = "train.momentum=0.9" if optimizer == "sgd" else "train.momentum=0.0"
    toml = tiny_toml.replace("steps = 3\n", "")
    skew = "data.partition={kind='dirichlet', alpha=0.5}"
    session = session_of(
        toml,
        f"train.optimizer={optimizer}",
        momentum,
        length,
        "train.lr=0.01",
        "train.weight_decay=0.1",
        skew,
        "privacy={unit='none'}",
    )
    state = moved_state(session)
    found = compare(
        session,
        [LocalTraining(c, state) for c in CLIENTS],
        names_of(state, ("lora_A", "lora_B", "head")),
        1e-4 if optimizer == "adamw" else 1e-5,
    )
    assert len({t.steps for t in found.values()}) == (1 if "steps" in length else 3)


def test_each_client_has_its_own_plan_rank_and_start(tiny_toml: str):
    """Clip, σ, steps, rank, and tensors that it kept for itself: none leaks into another."""
    session = session_of(tiny_toml)
    common = moved_state(session)
    members = []
    for i, client in enumerate(CLIENTS):
        own = {
            n: v for n, v in moved_state(session, seed=i + 5).items() if n.endswith("lora_B") or n.startswith("head.")
        }
        plan = plan_of(session, client, clip=0.1 * (i + 1), sigma=0.5 + i, steps=2 + i) if i else None
        members.append(LocalTraining(client, common | own, plan, rank=(None, 2, 3)[i]))
    compare(session, members, names_of(common, ("lora_A", "lora_B", "head")))
    compare(session, list(reversed(members)), names_of(common, ("lora_B", "head")))


@pytest.mark.parametrize(
    "settings", [["train.momentum=0.9", "train.prox=0.1"], ["train.optimizer=adamw", "train.momentum=0.0"]], ids=str
)
def test_each_client_has_its_own_learning_rate(settings: list[str], tiny_toml: str):
    own = ["clients.lr={client-0=0.25, client-2=3}", "train.lr=0.2", "train.head_lr=0.1", "train.weight_decay=0.1"]
    session = session_of(tiny_toml, *settings, *own)
    state = moved_state(session)
    members = [LocalTraining(c, state, plan_of(session, c, sigma=1e-6) if c == "client-1" else None) for c in CLIENTS]
    names = names_of(state, ("lora_A", "lora_B", "head"))
    found = compare(session, members, names, 1e-4 if "adamw" in str(settings) else 1e-5)
    same = train_cohort(
        session.model, session.data, members, names, session_of(tiny_toml, *settings, *own[1:]).config, 2
    )

    def size(trained: dict, client: str) -> float:
        return sum(float(v.double().square().sum()) for v in trained[client].update.values()) ** 0.5

    assert size(found, "client-0") < 0.5 * size(same, "client-0")
    assert size(found, "client-1") == pytest.approx(size(same, "client-1"), rel=1e-6)
    assert size(found, "client-2") > 1.5 * size(same, "client-2")


def test_an_empty_poisson_batch_is_a_step_of_noise_alone(tiny_toml: str):
    session = session_of(tiny_toml)
    state = moved_state(session)
    members = [LocalTraining(c, state, plan_of(session, c, batch_size=1, steps=6, sigma=2.0)) for c in CLIENTS]
    empty = 0
    for m in members:
        draws = random_stream(session.config.run.seed, "batches", m.client, 2)
        empty += sum(len(m.plan.batch(draws)) == 0 for _ in range(6))
    assert empty, "some batches are empty"
    found = compare(session, members, names_of(state, ("lora_B", "head")))
    assert all(t.steps == 6 for t in found.values())


@pytest.mark.parametrize("size", [1, 5, 64])
def test_the_physical_batch_changes_rounding_alone(size: int, tiny_toml: str):
    session = session_of(tiny_toml, f"train.physical_batch={size}")
    state = moved_state(session)
    compare(
        session, [LocalTraining(c, state, plan_of(session, c)) for c in CLIENTS], names_of(state, ("lora_B", "head"))
    )


def test_float64_agrees_to_1e_10(tiny_toml: str):
    session = session_of(tiny_toml)
    state = {n: v.double() for n, v in moved_state(session).items()}
    session.model.module.double()
    try:
        for private in (False, True):
            members = [LocalTraining(c, state, plan_of(session, c) if private else None) for c in CLIENTS]
            found = compare(session, members, names_of(state, ("lora_A", "lora_B", "head")), 1e-10)
            assert all(v.dtype == torch.float64 for t in found.values() for v in t.update.values())
    finally:
        session.model.module.float()


def test_one_client_that_diverges_is_named_and_spares_the_others(tiny_toml: str):
    session = session_of(tiny_toml, "privacy={unit='none'}")
    state = moved_state(session)
    broken = {n: v * 1e30 if n.endswith("lora_B") else v for n, v in state.items()}
    names = names_of(state, ("lora_B",))
    found = train_cohort(
        session.model,
        session.data,
        [LocalTraining(CLIENTS[0], state), LocalTraining(CLIENTS[1], broken)],
        names,
        session.config,
        1,
    )
    assert isinstance(found[CLIENTS[0]], Trained)
    assert isinstance(found[CLIENTS[1]], RunFailed)
    assert "diverged" in str(found[CLIENTS[1]])


def test_the_model_is_left_as_it_was(tiny_toml: str):
    session = session_of(tiny_toml)
    state = moved_state(session)
    session.model.load(state)
    batch = session.data.tokens.batch(session.data.test[:4], session.model.tokenizer.pad_token_id)
    with torch.no_grad():
        before = session.model.logits(batch)
    members = [LocalTraining(c, state, plan_of(session, c)) for c in CLIENTS]
    train_cohort(session.model, session.data, members, names_of(state, ("lora_B", "head")), session.config, 1)
    session.model.load(state)
    with torch.no_grad():
        assert torch.equal(session.model.logits(batch), before)
    assert all(p.grad is None and not p.requires_grad for p in session.model.module.parameters())


@pytest.mark.parametrize("private", [False, True], ids=["plain", "dp"])
@pytest.mark.parametrize("model", ["tiny_bert", "tiny_gpt2"])
def test_dropout_masks_belong_to_the_example_whoever_shares_the_pass(
    model: str, private: bool, tiny_toml: str, tiny_bert, request: pytest.FixtureRequest
):
    toml = tiny_toml.replace(str(tiny_bert), str(request.getfixturevalue(model)))
    everywhere = "lora.target_modules='all-linear'"
    session = session_of(toml, "lora.dropout=0.4", everywhere, "train.lr=0.05")
    state = {n: v.double() for n, v in moved_state(session).items()}
    session.model.module.double()
    try:
        names = names_of(state, ("lora_A", "lora_B", "head"))
        members = [LocalTraining(c, state, plan_of(session, c) if private else None) for c in CLIENTS]
        dropped = compare(session, members, names, 1e-10)
        without = session_of(toml, everywhere, "train.lr=0.05").config
        kept = train_cohort(session.model, session.data, members, names, without, 2)
    finally:
        session.model.module.float()
    for n in (n for n in names if "lora" in n):
        assert all(not torch.allclose(dropped[c].update[n], kept[c].update[n], rtol=0.01) for c in CLIENTS), n  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [1, 64], ids=["thin", "merged"])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_one_client_alone_in_a_pass(size: int, parts: str, tiny_toml: str):
    """With enough rows, W + s·B·A is formed for the pass."""
    session = session_of(tiny_toml, f"train.physical_batch={size}", "lora.target_modules='all-linear'", "train.lr=0.05")
    state = moved_state(session)
    compare(session, [LocalTraining(CLIENTS[0], state, plan_of(session, CLIENTS[0]))], names_of(state, PARTS[parts]))


def test_nothing_to_train_is_refused(tiny_toml: str):
    session = session_of(tiny_toml)
    state = moved_state(session)
    with pytest.raises(RunFailed, match="nothing is trainable"):
        train_cohort(session.model, session.data, [LocalTraining(CLIENTS[0], state)], [], session.config, 1)
