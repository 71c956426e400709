"""The audit of the real trainer: a correct build passes, and every broken one that we can think of is noticed.

``pytest -s -k table`` prints the table for the docs; ``simulations/benchmarks/mutations.py`` prints it for any
configuration.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.lora.state import part_of
from fedlab.privacy.noise import SeededNoise
from fedlab.privacy.plan import DPPlan
from fedlab.session import Session, open_session
from fedlab.train import trainer
from fedlab.trainer_audit.empirical import SIZE, audit_session, canary_bounds, empirical_audit, places, scores
from fedlab.trainer_audit.mechanism import check_mechanism
from fedlab.trainer_audit.observation import Records, observe, subject


def _script() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "simulations" / "benchmarks" / "mutations.py"
    spec = importlib.util.spec_from_file_location("mutations", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


mutations = _script()

# What must notice each mutation; others may as well.
NOTICED = {
    "none (correct build)": (),
    "noise off": ("steinke", "f-dp", "cp-gdp", "noise variance"),
    "half noise": ("f-dp", "cp-gdp", "noise variance"),
    "noise divided by the batch size": ("steinke", "f-dp", "cp-gdp", "noise variance"),
    "σ accounted for is 1.2 times what is drawn": ("noise variance",),
    "uniform noise of the same variance": ("noise variance",),
    "noised sum cut to ±C": ("noise variance",),
    "clipping skipped": ("steinke", "f-dp", "cp-gdp", "sensitivity"),
    "batch mean clipped": ("steinke", "f-dp", "cp-gdp", "sensitivity"),
    "clipped per layer, accounted once": ("sensitivity",),
    "clip loosened after the first step": ("sensitivity",),
    "a gradient holds its neighbour's too": ("sensitivity",),
    "NaN passes min(1, C/norm)": ("sensitivity",),
    "NaN passes and is zeroed afterwards": ("sensitivity",),
    "divided by the realised batch size": ("sensitivity", "noise variance"),
    "head un-noised": ("noise variance", "post-processing"),
    "a tenth of the raw sum added": ("sensitivity", "post-processing"),
    "momentum from the raw sum": ("post-processing",),
    "the audit's way in ignored": ("sensitivity",),
    "same noise every step": ("noise variance", "noise correlation"),
    "same noise every round": ("noise correlation",),
    "same noise for every client": ("noise correlation",),
    "same noise in every tensor": ("noise correlation",),
    "shuffled, not Poisson, batches": ("sampler",),
    "fixed-size batches": ("sampler",),
    "same batches every round": ("sampler",),
    "empty batches skipped": ("steps",),
    "twice the steps charged": ("sensitivity", "noise variance", "steps"),
}


@pytest.fixture(scope="module")
def audit_toml(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path, tiny_data: Path) -> str:
    """One BERT layer of width 64 with rank 16: 2,243 coordinates in lora_B and head, and a forward pass of
    milliseconds.
    """
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=32,
    )
    path = tmp_path_factory.mktemp("audited")
    BertModel(shape).save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer_files).save_pretrained(path)
    return f"""
[run]
rounds = 3
seed = 3
backend = "local"
[model]
name = "{path}"
[lora]
rank = 16
alpha = 16
target_modules = ["query", "value"]
[data]
source = "files"
path = "{tiny_data}"
text = "text"
label = "topic"
clients = 3
max_length = 16
test_fraction = 0.2
[train]
steps = 3
batch_size = 16
physical_batch = 512
lr = 0.5
momentum = 0.5
prox = 0.1
[privacy]
unit = "example"
sigma = 1.3
clip = 0.7
"""


@pytest.fixture(scope="module")
def session(audit_toml: str) -> Session:
    return open_session(RunConfig.parse(audit_toml).to_toml())


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, dict[str, list[str]]]]:
    rows: dict[str, dict[str, list[str]]] = {}
    yield rows
    print("\n" + mutations.markdown(rows))


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: m.name)
def test_table_of_mutations(mutation, session: Session, table: dict[str, dict[str, list[str]]]):
    table[mutation.name] = row = mutations.detect(session, mutation)
    noticed = {detector for detector, findings in row.items() if findings}
    assert noticed >= set(NOTICED[mutation.name])
    assert bool(noticed) == bool(mutation.edits), row


def test_a_mutation_of_text_that_is_gone_is_an_error():
    stale = mutations.Mutation("stale", ((DPPlan, "privatise", "no such text", ""),))
    before = DPPlan.privatise
    with pytest.raises(LookupError, match="stale: 'no such text' is not"), mutations.mutated(stale):
        pass
    assert DPPlan.privatise is before


def passes(session: Session, seed: int) -> None:
    audit = audit_session(session, seed=seed)
    assert audit.findings == (), seed
    assert audit.claimed == pytest.approx(4.377, abs=1e-3)
    assert audit.canaries == 2000
    bounds = {bound.name: bound.epsilon for bound in audit.bounds}
    assert 0.7 < bounds["steinke"] < audit.claimed
    assert 1.2 < bounds["f-dp"] < audit.claimed
    assert 1.2 < bounds["cp-gdp"] < audit.claimed


def test_a_correct_build_passes_twenty_seeds(session: Session):
    for seed in range(20):
        passes(session, seed)


@pytest.mark.slow
def test_a_correct_build_passes_a_hundred_seeds(session: Session):
    for seed in range(100):
        passes(session, seed)


def test_scores_are_coins_plus_noise(session: Session):
    """Mean 1 where a canary is in, 0 where not, σ around it: with what the real records put there taken off."""
    who = subject(session, seed=4)
    tensor, element = places(who, 2000, np.random.default_rng(0))
    coins = np.arange(2000) % 2 == 0
    real = session.data.train(who.client)[:8]
    clip = who.plan(1, 1, 1).clip
    records = Records(int(real[0]), real, tensor, element, np.where(coins, SIZE * clip, 0.0))
    run = observe(who, records, who.plan(2008, 2008, 1, sigma=0.01))
    found = scores(who, records, run)
    assert found[coins].mean() == pytest.approx(1, abs=1e-3)
    assert found[~coins].mean() == pytest.approx(0, abs=1e-3)
    assert found[~coins].std() == pytest.approx(0.01, rel=0.1)
    assert float(np.abs(run.log.released[0]).max()) > 0
    assert len(run.log.positions[0]) == 2008


def test_canaries_have_coordinates_of_their_own_in_every_tensor(session: Session):
    who = subject(session, parts=("lora_A", "lora_B", "head"))
    tensor, element = places(who, 1500, np.random.default_rng(0))
    assert len(set(zip(tensor, element, strict=True))) == 1500
    assert (element < who.sizes[tensor]).all()
    counts = {name: int((tensor == i).sum()) for i, name in enumerate(who.names)}
    assert all(counts.values())
    by_part = {part: sum(c for n, c in counts.items() if part_of(n) == part) for part in ("lora_A", "lora_B", "head")}
    assert by_part["head"] == 195, "all of it: it has fewer than a third"
    assert abs(by_part["lora_A"] - by_part["lora_B"]) <= 1


def test_canaries_are_as_many_as_there_are_coordinates(session: Session):
    bounds, _, notes, _ = canary_bounds(subject(session), 10**5, 0)
    assert bounds[0].canaries == 2 * 64 * 16 + 64 * 3 + 3
    assert notes == (
        "100000 canaries were asked for, but only 2243 coordinates are trained; one canary has one of its own",
    )


def test_a_production_audit_keeps_the_clients_plan(audit_toml: str):
    config = RunConfig.parse(audit_toml, ["privacy.sigma=0.6"])
    audit = empirical_audit(config, canaries=800, production=True)
    plan = open_session(config.to_toml()).plan("client-0")
    assert plan is not None
    assert audit.findings == ()
    assert audit.claimed == pytest.approx(plan.epsilon(plan.participations), rel=1e-6)
    assert audit.configuration["q"] == pytest.approx(plan.q)
    assert audit.configuration["steps"] == plan.steps * plan.participations
    assert any("approximation" in note for note in audit.notes)
    again = json.loads(json.dumps(audit.to_dict(), allow_nan=False))
    assert [bound["name"] for bound in again["bounds"]] == ["steinke", "f-dp", "cp-gdp"]


def test_all_parts_with_dropout_and_small_batches_pass(audit_toml: str):
    config = RunConfig.parse(
        audit_toml, ["lora.dropout=0.3", "train.physical_batch=7", "train.optimizer=adamw", "train.momentum=0.0"]
    )
    findings = check_mechanism(open_session(config.to_toml()), "client-2", parts=("lora_A", "lora_B", "head"))
    assert not any(findings.values()), findings


def test_a_decoder_passes(audit_toml: str, tiny_gpt2: Path):
    name = next(line for line in audit_toml.splitlines() if line.startswith("name"))
    toml = audit_toml.replace(name, f'name = "{tiny_gpt2}"').replace('["query", "value"]', '"auto"')
    audit = empirical_audit(RunConfig.parse(toml), canaries=500)
    assert audit.findings == ()
    assert audit.canaries == 500


def test_secure_noise_passes_and_must_not_repeat_itself(audit_toml: str, monkeypatch: pytest.MonkeyPatch):
    session = open_session(RunConfig.parse(audit_toml, ["privacy.noise=secure"]).to_toml())
    findings = check_mechanism(session)
    assert not any(findings.values()), findings
    monkeypatch.setattr(DPPlan, "noise_source", lambda self, rng: SeededNoise(rng))
    monkeypatch.setattr(DPPlan, "sampler", lambda self, rng: rng)
    findings = check_mechanism(session)
    assert any("round 1 again" in finding for finding in findings["noise correlation"])
    assert any("two batches share" in finding for finding in findings["sampler"])


def test_training_that_breaks_is_a_finding(session: Session, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer, "clipped_sum", broken)
    audit = audit_session(session, canaries=50)
    assert audit.bounds == ()
    assert audit.findings[0] == "training failed among canaries: out of memory"


def test_the_model_is_left_as_it_was(session: Session):
    check_mechanism(session)
    assert not any(p.requires_grad or p.grad is not None for p in session.model.module.parameters())
    assert not any(module.training for module in session.model.module.modules())


def test_what_cannot_be_audited(session: Session, audit_toml: str):
    with pytest.raises(ConfigError, match="client 'client-9' is unknown; there are client-0 to client-2"):
        check_mechanism(session, "client-9")
    with pytest.raises(ConfigError, match="unknown part 'lora_C'"):
        check_mechanism(session, parts=("lora_C",))
    public = audit_toml.partition("[privacy]")[0]
    with pytest.raises(ConfigError, match="there is nothing to audit"):
        empirical_audit(RunConfig.parse(public))
