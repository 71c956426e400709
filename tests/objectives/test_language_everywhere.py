"""A tiny decoder through all that fedlab can do: strategies, unequal clients, engines, caches, streams, audits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fedlab
from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.models.adapters import initial_state
from fedlab.models.plain import load_run
from fedlab.privacy.audit.run import audit_run
from fedlab.run.audit import audit_directory
from fedlab.run.launch import check
from fedlab.seeds import random_stream
from fedlab.session import open_session
from fedlab.train.trainer import train_client
from fedlab.trainer_audit.empirical import empirical_audit
from strategies import CONTINUAL, STRATEGIES

pytestmark = pytest.mark.usefixtures("undrawn")
PLAIN, QUICK = "privacy={unit='none'}", "evaluate.evaluators=['language']"
DP = "privacy={unit='example', sigma=1.0, clip=1.0}"
CLIENT_DP = "privacy={unit='client', sigma=1.0, clip=1.0}"
UNEQUAL = "clients.rank={client-0=1, client-2=2}"
OF_ONE_TASK = STRATEGIES.keys() - {*CONTINUAL, "head"}
QUICKEST = {"fedsvd", "flexlora", "fedsa"}
WORDS = ["wave", "tide", "iron", "rust", "plum", "the", "old", "deep"]


def parsed(toml: str, *overrides: str) -> RunConfig:
    """Plain text has no label column."""
    plain = "objective.name=causal-lm" in overrides
    return RunConfig.parse(toml.replace('label = "topic"\n', "") if plain else toml, [QUICK, *overrides])


def simulate(toml: str, out: Path, *overrides: str) -> fedlab.Run:
    return fedlab.simulate(parsed(toml, *overrides), out, quiet=True)


def adapter(run: fedlab.Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "adapter" / "adapter_model.safetensors")


def slow(*values: str) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of reports are half of a tiny run's time, and not looked at here."""
    import fedlab.report.plots as plots
    import fedlab.report.stream as stream

    for module, name in ((plots, "line_chart"), (plots, "bar_chart"), (stream, "heat_map")):
        monkeypatch.setattr(module, name, lambda title, *_, **__: f"<svg><title>{title}</title></svg>")


@pytest.fixture
def few(llama_toml: str) -> str:
    """Two rounds of two steps on 150 texts, scored at the end."""
    text = llama_toml.replace("rounds = 3", "rounds = 2").replace("every = 1", "every = 2")
    return text.replace("steps = 3", "steps = 2").replace('label = "topic"', 'label = "topic"\nlimit = 150')


@pytest.fixture
def tasks(few: str, tmp_path: Path) -> str:
    """A stream of two tasks: name the topic, and count the words, of other texts."""
    rng, lines = np.random.default_rng(5), []
    for _ in range(200):
        words = rng.choice(WORDS, int(rng.integers(3, 7)))
        lines.append(json.dumps({"text": "count " + " ".join(words), "topic": " ".join(["thing"] * len(words))}))
    path = tmp_path / "count.jsonl"
    path.write_text("\n".join(lines))
    return few + f'\n[[tasks]]\nname = "topic"\n[[tasks]]\nname = "count"\ndata = {{path = "{path}"}}\n'


def test_without_dp_answers_are_learnt(llama_toml: str, tmp_path: Path):
    settings = [PLAIN, "strategy.name=fedavg", "train.optimizer=adamw", "train.momentum=0.0", "train.lr=0.02"]
    run = simulate(llama_toml, tmp_path / "run", *settings, "train.steps=12")
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["scores"]["loss"] for line in lines if line["phase"] == "evaluate"]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("name", [*sorted(QUICKEST), *slow(*sorted(OF_ONE_TASK - QUICKEST))])
def test_every_strategy_trains_it_under_dp_and_passes_the_audit(name: str, few: str, tmp_path: Path):
    run = simulate(few, tmp_path / "run", f"strategy.name={name}")
    assert run.result["status"] == "completed"
    assert run.result["epsilon"] > 0
    assert not audit_run(run.path).findings
    plan = json.loads((run.path / "ledger" / "client-0.jsonl").read_text().splitlines()[0])
    assert "head" not in json.dumps(plan), "no plan speaks of a head that is not there"


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["causal-lm", "instruction"])
@pytest.mark.parametrize("name", sorted(OF_ONE_TASK))
def test_every_strategy_trains_it_without(name: str, objective: str, few: str, tmp_path: Path):
    run = simulate(few, tmp_path / "run", f"strategy.name={name}", f"objective.name={objective}", PLAIN)
    assert run.result["status"] == "completed"


def test_a_round_is_the_mean_of_what_the_reference_trainer_gives(few: str, tmp_path: Path):
    """FFA, in a shared pass: B moves by the clients' mean, A stays."""
    run = simulate(few, tmp_path / "run", "strategy.name=ffa", "run.rounds=1", "strategy.weights=uniform")
    session = open_session(run_config(run).to_toml())
    state = initial_state(session.model, session.config.lora, session.config.run.seed)
    names = [name for name in state if name.endswith("lora_B")]
    mean = {name: torch.zeros_like(state[name], dtype=torch.float64) for name in names}
    for client in session.data.clients:
        plan = session.plan(client)
        update = train_client(session.model, session.data, client, state, names, session.config, 1, plan).update
        for name in names:
            mean[name] += update[name].double() / len(session.data.clients)
    for name, value in adapter(run).items():
        own = name.removeprefix("base_model.model.").removesuffix(".weight")
        wanted = state[own] + mean.get(own, torch.zeros(())).float()
        assert torch.allclose(value, wanted, atol=1e-5 * float(wanted.abs().max())), name


def run_config(run: fedlab.Run) -> RunConfig:
    return RunConfig.load(run.path / "run.toml")


@pytest.mark.parametrize("objective", ["instruction", "causal-lm"])
def test_a_dp_step_against_a_loop_over_single_examples_with_transformers_loss(objective: str, few: str):
    config = parsed(few, f"objective.name={objective}", "train.momentum=0.0", "lora.dropout=0.0")
    session = open_session(config.to_toml())
    model, data, plan = session.model, session.data, session.plan("client-1")
    assert plan is not None
    g = torch.Generator().manual_seed(1)
    start = {n: 0.1 * torch.randn(v.shape, generator=g) for n, v in initial_state(model, config.lora, 0).items()}
    names = sorted(start)
    found = train_client(model, data, "client-1", start, names, config, 1, plan).update
    model.load(start)
    draws, noise = (random_stream(config.run.seed, what, "client-1", 1) for what in ("batches", "noise"))
    for _ in range(plan.steps):
        total = {n: torch.zeros_like(start[n], dtype=torch.float64) for n in names}
        parameters = [model.parameters[n].requires_grad_() for n in names]
        for index in data.train("client-1")[np.flatnonzero(draws.random(plan.n) < plan.q)]:
            one = data.batch(np.array([index]), model.tokenizer.pad_token_id)
            loss = model.module(input_ids=one["input_ids"], labels=one["labels"]).loss
            gradient = torch.autograd.grad(loss, parameters)
            norm = sum(float(v.double().square().sum()) for v in gradient) ** 0.5
            for n, v in zip(names, gradient, strict=True):
                total[n] += v.double() * min(1.0, plan.clip / norm)
        for n in names:
            noised = total[n] + torch.from_numpy(noise.standard_normal(total[n].shape)) * plan.sigma * plan.clip
            with torch.no_grad():
                model.parameters[n] -= (config.train.lr * noised / (plan.q * plan.n)).float()
    model.module.requires_grad_(False)
    end = model.state()
    for n in names:
        assert torch.allclose(found[n], end[n] - start[n], atol=1e-5), n


@pytest.mark.parametrize("engine", ["run.cohort=1", *slow("train.gradients=hooks", "train.gradients=opacus")])
def test_any_engine_and_any_pass_end_at_the_same(engine: str, few: str, tmp_path: Path):
    wanted, found = (
        simulate(few, tmp_path / str(i), "lora.dropout=0.2", "run.rounds=1", *own)
        for i, own in enumerate((["run.cohort=3"], [engine]))
    )
    assert found.result["epsilon"] == wanted.result["epsilon"]
    for name, value in adapter(found).items():
        assert torch.allclose(value, adapter(wanted)[name], atol=2e-5), name


def test_hidden_states_are_kept_and_blocks_computed_again_for_it_too(few: str, tmp_path: Path):
    upper = ["lora.layers_to_transform=[1]", "run.rounds=1"]
    plain, kept, again = (
        simulate(few, tmp_path / f"{i}", *upper, *own)
        for i, own in enumerate(([], ["run.cache_hidden_states=true"], ["run.checkpointing=true"]))
    )
    assert plain.result["scores"]["loss"] == pytest.approx(kept.result["scores"]["loss"], rel=1e-4)
    for name, value in adapter(plain).items():
        assert torch.allclose(value, adapter(kept)[name], atol=1e-4), name
        assert torch.equal(value, adapter(again)[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        ["run.dtype=bfloat16", "run.wire_dtype=bfloat16"],
        [CLIENT_DP, "strategy={name='ffa', weights='uniform'}"],
        ["strategy.name=hetlora", UNEQUAL],
        ["strategy={name='fedavg', robust={rule='coordinate_median'}}", "clients.lr={client-1=0.5}"],
        pytest.param(
            ["data.partition={kind='natural', column='site'}", "data.clients=5", "privacy.share_metrics=true"],
            marks=pytest.mark.slow,
        ),
        *(pytest.param([f"strategy.name={name}", UNEQUAL], marks=pytest.mark.slow) for name in ("fedsvd", "flora")),
        *(pytest.param([f"strategy.name={name}", UNEQUAL], marks=pytest.mark.slow) for name in ("flexlora", "fedavg")),
        *(
            pytest.param([f"strategy={{name='fedavg', robust={{{rule}}}}}", PLAIN], marks=pytest.mark.slow)
            for rule in ("rule='trimmed_mean', trim=0.34", "rule='krum', byzantine=0", "rule='geometric_median'")
        ),
        pytest.param([CLIENT_DP, "strategy={name='fedsvd', weights='uniform'}"], marks=pytest.mark.slow),
        pytest.param(["train.prox=0.5", "lora.init_a=kaiming", "lora.rslora=true"], marks=pytest.mark.slow),
        pytest.param(["objective.loss=sum", "train.schedule=cosine"], marks=pytest.mark.slow),
        pytest.param(["data.max_length=12", "objective.template='Q: {prompt} A:'"], marks=pytest.mark.slow),
    ],
    ids=lambda settings: " ".join(settings),
)
def test_what_else_a_run_can_ask_for(settings: list[str], few: str, tmp_path: Path):
    run = simulate(few, tmp_path / "run", *settings)
    assert run.result["status"] == "completed"
    assert not audit_run(run.path).findings


def test_what_is_saved_loads_with_plain_peft_and_says_the_same(few: str, tmp_path: Path, tiny_llama: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = simulate(few, tmp_path / "run", PLAIN, "train.lr=2.0")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), run.path / "adapter").eval()
    ours = load_run(run.path)
    ids = AutoTokenizer.from_pretrained(tiny_llama)(["old tide wave"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=ids).logits, ours(input_ids=ids).logits)
        bare = AutoModelForCausalLM.from_pretrained(tiny_llama)
        assert not torch.allclose(plain(input_ids=ids).logits, bare(input_ids=ids).logits, atol=1e-4)


def test_resume_gives_the_bits_of_an_unbroken_run_and_both_are_audited(
    few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import strategies.server.loop as loop

    whole = simulate(few, tmp_path / "whole")
    original = loop.Rounds._round

    def interrupted(self: loop.Rounds, number: int) -> bool:
        if number == 2:
            raise KeyboardInterrupt
        return original(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Rounds, "_round", interrupted)
        with pytest.raises(fedlab.Interrupted):
            simulate(few, tmp_path / "cut")
    resumed = fedlab.resume(tmp_path / "cut", quiet=True)
    for key in ("adapter_digest", "scores", "client_scores", "epsilon"):
        assert resumed.result[key] == whole.result[key], key
    for run in (whole, resumed):
        assert audit_directory(run.path, None, [], False) == 0
        assert "CONSISTENT" in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["instruction", *slow("causal-lm")])
def test_the_empirical_audit_finds_nothing(objective: str, few: str):
    config = parsed(few, f"objective.name={objective}", "train.physical_batch=64")
    audit = empirical_audit(config, canaries=200)
    assert audit.findings == ()
    assert audit.configuration["parts"] == ["lora_B"]


@pytest.mark.parametrize(
    ("name", "unit"),
    [("fedsvd-continual", DP), ("osft", PLAIN)]
    + [
        pytest.param(name, unit, marks=pytest.mark.slow)
        for name, unit in (
            *((name, DP) for name in ("osft-data", "osft", "o-lora", "full", "fedavg")),
            *((name, PLAIN) for name in ("osft-data", "fedsvd-continual", "o-lora", "full", "fedavg")),
        )
    ],
)
def test_a_stream_of_different_instructions(name: str, unit: str, tasks: str, tmp_path: Path):
    reads = ", energy=0.5, free=4" if name in ("osft-data", "fedsvd-continual") else ""
    run = simulate(tasks, tmp_path / "run", f"strategy={{name='{name}'{reads}}}", unit, "run.rounds=1")
    R = run.result["matrix"]
    assert run.result["status"] == "completed"
    assert all(value is not None for row in R for value in row), "no heads: every task has a score at any time"
    if name in ("osft", "osft-data", "fedsvd-continual"):
        assert run.result["leak"] < 1e-5
    if unit == DP:
        assert run.result["epsilon"] > 0
        assert not any(audit_run(path).findings for path in sorted(run.path.glob("task-*")))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["strategy.name=head"], 'objective.name = "instruction": this objective trains no head; take a strategy with'),
        (["train.head=freeze"], 'train.head = "freeze", but objective.name = "instruction" trains no head; remove it'),
        (["train.head_lr=0.1"], 'train.head_lr = 0.1, but objective.name = "instruction" trains no head'),
        (["data.partition={kind='dirichlet', alpha=0.5}"], "assigns by label"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: list[str], reason: str, few: str):
    with pytest.raises(ConfigError, match=reason):
        check(RunConfig.parse(few, settings))


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ('[stream]\nheads = "shared"\n', 'stream.heads = "shared", but objective.name = "instruction" trains no head'),
        ('[[tasks]]\nname = "third"\nlabels = ["fruit"]\n', "this objective's labels have none"),
    ],
)
def test_heads_and_label_patterns_have_no_meaning_in_its_streams(tables: str, reason: str, tasks: str):
    with pytest.raises(ConfigError, match=reason):
        check(RunConfig.parse(tasks + tables, [PLAIN, "strategy={name='osft'}"]))
