"""Every objective, one row each, through what the rest of fedlab relies on: losses that belong to one example each,
labels that can be measured without data, a head that is what it says, evaluators that give the primary score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlab.config import RunConfig
from fedlab.data.collate import probe_batch
from fedlab.errors import ConfigError
from fedlab.evaluate import EVALUATORS, evaluate, evaluators_of, spread
from fedlab.models.adapters import initial_state
from fedlab.objectives import OBJECTIVES
from fedlab.session import Session, open_session
from fedlab.train.cohort import train_cohort
from fedlab.train.local import LocalTraining, Trained
from fedlab.train.trainer import train_client

WORDS = ["apple", "pear", "iron", "rust", "wave", "tide", "the", "old"]
# name → the label of a text of so many words, as a file would have it
ROWS: dict[str, Callable[[int], str]] = {
    "causal-lm": lambda words: "",
    "classification": lambda words: ("short", "middling", "long")[words % 3],
    "instruction": lambda words: ("short", "middling", "a long one")[words % 3],
    "multi-label": lambda words: json.dumps([name for i, name in enumerate(("even", "three")) if not words % (i + 2)]),
    "regression": lambda words: str(words / 10 - 0.5),
    "seq2seq": lambda words: ("short", "middling", "a long one")[words % 3],
}
GENERATIVE = {"causal-lm": "causal_toml", "instruction": "llama_toml", "seq2seq": "t5_toml"}
Open = Callable[..., Session]


@pytest.fixture
def session_of(request: pytest.FixtureRequest, tiny_toml: str, tiny_data: Path, tmp_path: Path) -> Open:
    """A function: name of an objective, overrides → a session on a small file."""
    return lambda name, *overrides: opened(name, request, tiny_data, tmp_path, *overrides)


def opened(name: str, request: pytest.FixtureRequest, tiny_data: Path, tmp_path: Path, *overrides: str) -> Session:
    toml = str(request.getfixturevalue(GENERATIVE.get(name, "tiny_toml")))
    rng, lines = np.random.default_rng(2), []
    for _ in range(90):
        words = int(rng.integers(2, 12))
        lines.append(json.dumps({"text": " ".join(rng.choice(WORDS, words)), "topic": ROWS[name](words)}))
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    toml = toml.replace(str(tiny_data), str(path))
    return open_session(RunConfig.parse(toml, [f"objective.name={name}", *overrides]).to_toml())


def moved(session: Session) -> dict[str, torch.Tensor]:
    """A state whose adapter and head are not at zero."""
    g = torch.Generator().manual_seed(0)
    start = initial_state(session.model, session.config.lora, 0)
    return {name: value + 0.2 * torch.randn(value.shape, generator=g) for name, value in start.items()}


def test_every_objective_has_a_row_here_and_a_line_in_the_docs():
    text = (Path(__file__).resolve().parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert ROWS.keys() == OBJECTIVES.keys()
    for name in (*OBJECTIVES, *EVALUATORS):
        assert f"| `{name}` |" in text, f"docs/objectives.md says nothing of {name}"


@pytest.mark.parametrize("name", ROWS)
def test_an_examples_loss_is_its_own(name: str, session_of: Open):
    session = session_of(name)
    model, data = session.model, session.data
    model.load(moved(session))
    some = data.train("client-0")[:6]
    batch = data.batch(some, model.tokenizer.pad_token_id)
    with torch.no_grad():
        losses = model.objective.per_example_loss(model, batch)
        alone = [
            model.objective.per_example_loss(model, data.batch(some[i : i + 1], model.tokenizer.pad_token_id))
            for i in range(len(some))
        ]
    assert losses.shape == (len(some),)
    assert torch.allclose(losses, torch.cat(alone), atol=1e-5), "padded among others it is what it is alone"
    assert model.objective.predict(model, batch).shape[0] == len(some)
    assert len(set(np.round(losses.tolist(), 6))) > 1


@pytest.mark.parametrize("name", ROWS)
def test_one_client_alone_and_in_a_shared_pass_release_the_same(name: str, session_of: Open):
    session = session_of(name)
    state = moved(session)
    names = [n for n in state if n.endswith("lora_B") or n.startswith("head.")]
    trainings = [LocalTraining(client, state, session.plan(client)) for client in session.data.clients]
    found = train_cohort(session.model, session.data, trainings, names, session.config, 1)
    for t in trainings:
        alone = train_client(session.model, session.data, t.client, t.state, names, session.config, 1, t.plan)
        together = found[t.client]
        assert isinstance(together, Trained)
        for n in names:
            assert torch.allclose(together.update[n], alone.update[n], atol=1e-5 * float(alone.update[n].abs().max()))


@pytest.mark.parametrize("name", ROWS)
def test_what_it_says_of_itself_holds(name: str, session_of: Open):
    session = session_of(name)
    model, objective, config = session.model, session.model.objective, session.config
    head = [name for name in model.parameters if name.startswith("head.")]
    assert bool(head) == (objective.head_width is not None) == objective.has_head
    probe = probe_batch(model.tokenizer, objective, 2, 9)
    assert probe["input_ids"].shape == (2, 9)
    assert objective.per_example_loss(model, probe).isfinite().all()
    evaluators = evaluators_of(config)
    assert objective.primary in {score for evaluator in evaluators.values() for score in evaluator.scores}
    found = evaluate(model, session.data, session.data.test, config)
    assert list(found) == [score for evaluator in evaluators.values() for score in evaluator.scores]
    assert all(math.isfinite(value) for value in found.values())
    none = evaluate(model, session.data, session.data.test[:0], config)
    assert none.keys() == found.keys()
    assert all(math.isnan(value) for value in none.values())


def test_unknown_names_are_refused_by_name(tiny_toml: str):
    import fedlab

    for overrides, expected in (
        (
            ["objective.name=classifcation"],
            'objective.name = "classifcation" is unknown; known: causal-lm, classification',
        ),
        (["evaluate.evaluators=['perplexity']"], '"perplexity" cannot judge objective.name = "classification"'),
    ):
        with pytest.raises(ConfigError, match=expected):
            fedlab.simulate(RunConfig.parse(tiny_toml, overrides), quiet=True)


def test_the_worst_client_is_the_one_of_the_worst_score():
    wanted = {"mean": 0.4, "worst": 0.2, "worst_decile": 0.2, "std": 0.2}
    assert spread([0.2, 0.6, math.nan], higher=True) == pytest.approx(wanted)
    assert spread([0.2, 0.6], higher=False)["worst"] == 0.6
    assert spread([math.nan], higher=True) == dict.fromkeys(wanted)
