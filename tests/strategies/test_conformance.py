"""Every strategy, one row each, through the public conformance suite, and then inside real models and in the files that
peft loads.

``python tests/strategies/test_conformance.py`` prints the table of docs/strategies.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from fedlab.config import RunConfig
from fedlab.errors import ConfigError, FedlabError
from fedlab.lora import conformance
from fedlab.lora.average import client_weights
from fedlab.lora.state import State, effective_delta, modules, select
from fedlab.models.adapters import initial_state, save_adapter
from fedlab.models.loading import build
from strategies import AGGREGATORS
from strategies.base import Round

SHAPES = {"wide.q": (12, 20), "tall.v": (20, 12), "square.k": (16, 16)}  # m × n
RANK = 4


@dataclass(frozen=True)
class Row:
    """What a strategy promises: see ``fedlab.lora.conformance.check``."""

    name: str
    promise: str
    options: tuple[tuple[str, str], ...] = ()
    ranks: str | None = None  # "changes" or "held": what clients of lower rank amount to
    rewrites: tuple[str, ...] = ()  # parts that the server changes although clients do not train them
    reweigh: Callable[[State, dict[str, State], dict[str, float]], dict[str, float]] | None = None

    @property
    def title(self) -> str:
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.options)])


def by_norm(state: State, updates: dict[str, State], weights: dict[str, float]) -> dict[str, float]:
    """HetLoRA's weights, from dense products."""
    squares = dict.fromkeys(updates, 0.0)
    for client, update in updates.items():
        for module in modules(state):
            B, A = (update[f"{module}.{part}"].double() for part in ("lora_B", "lora_A"))
            held = (state[f"{module}.lora_B"].double()[:, : len(A)] + B) @ (
                state[f"{module}.lora_A"].double()[: len(A)] + A
            )
            squares[client] += float(held.square().sum())
    total = sum(s**0.5 for s in squares.values())
    return {client: s**0.5 / total for client, s in squares.items()} if total else weights


EXACT, FACTORS, BEST = "mean of products", "product of means", "best of rank r of the mean of products"
PROJECTED = "projected mean of products"
ROWS = [
    Row("fedavg", FACTORS, ranks="changes"),
    Row("ffa", EXACT, ranks="changes"),
    Row("fedsvd", EXACT, ranks="changes", rewrites=("lora_A",)),
    Row("fedsvd", EXACT, (("refresh", "{every=1, keep=1}"),), ranks="changes", rewrites=("lora_A",)),
    Row("fedex", EXACT),
    Row("flora", EXACT, ranks="held"),
    Row("flora", EXACT, (("train", "B"),), ranks="held", rewrites=("lora_A",)),
    Row("flexlora", BEST, ranks="held"),
    Row("flexlora", BEST, (("split", "left"),), ranks="held"),
    Row("hetlora", FACTORS, ranks="held", reweigh=by_norm),
    Row("hetlora", FACTORS, (("norm_weights", "false"),), ranks="held"),
    Row("lora-fair", PROJECTED),
    Row("rolora", EXACT, ranks="changes"),
    Row("fedsa", EXACT, ranks="changes"),  # of what is shared: B·(mean of A) for every B
    Row("head", "unchanged", ranks="changes"),
]
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.title)


def test_every_strategy_has_a_row():
    assert {row.name for row in ROWS} == set(AGGREGATORS)


def make(name: str, model: str = "", alpha: float = 8, rslora: bool = False, **options):
    text = f"[run]\nrounds=2\n[lora]\nrank={RANK}\nalpha={alpha}\nrslora={str(rslora).lower()}\n"
    text += "target_modules='all-linear'\n"
    text += f"[train]\nlr=1\nsteps=1\n[strategy]\nname='{name}'\n" + (f"[model]\nname='{model}'\n" if model else "")
    config = RunConfig.parse(text, [f"strategy.{k}={v}" for k, v in options.items()])
    return AGGREGATORS[name](config)


def after_round(strategy, state: State, updates, weights, number: int = 1) -> State:
    """The state after a round of a server that remembers nothing yet."""
    return strategy.aggregate(state, strategy.init(state), updates, weights, Round(number))[0]


@cache
def report(row: Row) -> conformance.Report:
    return conformance.check(
        make(row.name, **dict(row.options)),
        promise=row.promise,
        ranks=row.ranks or False,
        rewrites=row.rewrites,
        reweigh=row.reweigh,
        at_scale=lambda s: make(row.name, alpha=s * RANK, **dict(row.options)),
        refuses=(ValueError, FedlabError),
        tolerance=2e-6,
        title=row.title,
    )


@pytest.mark.parametrize("name", conformance.PROPERTIES)
@each_row
def test_conformance(row: Row, name: str):
    assert report(row)[name].ok is not False, report(row)[name].text


def test_the_docs_hold_the_generated_table():
    """Also says which properties do not apply to a strategy, so that none is skipped unseen."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "strategies.md").read_text(encoding="utf-8")
    marker = "<!-- conformance: generated by tests/strategies/test_conformance.py, which prints it -->\n"
    assert marker + conformance.markdown([report(row) for row in ROWS]) in text, (
        "run python tests/strategies/test_conformance.py"
    )


@pytest.mark.parametrize("row", [row for row in ROWS if row.promise in (FACTORS, BEST)], ids=lambda r: r.title)
def test_the_exact_mean_is_another_thing(row: Row):
    strategy = make(row.name, **dict(row.options))
    assert conformance.check(strategy, promise=EXACT, only=["unequal weights"])["unequal weights"].measured > 0.1


BATCH = {"input_ids": torch.tensor([[2, 7, 9, 30, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
each_model = pytest.mark.parametrize(
    "kind", ["tiny_bert", "tiny_gpt2"]
)  # Linear; Conv1D, which keeps its weight transposed
each_scale = pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])


def two_rounds(row: Row, path: Path, rslora: bool):
    """A real model, its strategy, and the state after two rounds of three clients."""
    strategy = make(row.name, str(path), rslora=rslora, **dict(row.options))
    loaded = build(strategy.config, 3)
    state, weights = initial_state(loaded, strategy.config.lora, 0), {"client-0": 0.3, "client-1": 0.1, "client-2": 0.6}
    for number in (1, 2):
        g = torch.Generator().manual_seed(number)
        names = strategy.sent_names(state, number)
        updates = {c: {n: torch.randn(state[n].shape, generator=g) * 0.1 for n in names} for c in weights}
        state = after_round(strategy, state, updates, weights, number)
    g = torch.Generator().manual_seed(3)  # what a client keeps, as it would come from its own disk
    own = {n: torch.randn(v.shape, generator=g) * 0.1 for n, v in sorted(select(state, strategy.personal).items())}
    return loaded, state | own


@cache
def base_model(path: Path):
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3).eval()
    base.config.pad_token_id = 0
    return base


@torch.no_grad()
def dense_logits(path: Path, state: State, rslora: bool) -> torch.Tensor:
    """Of a bare float64 base whose adapted weights are W + s·(B·A + residual)."""
    base = copy.deepcopy(base_model(path)).double()
    scale = 8 / RANK**0.5 if rslora else 8 / RANK
    for module in modules(state):
        layer = base.get_submodule(module)
        delta = effective_delta({n: v.double() for n, v in state.items()}, module, scale)
        layer.weight += delta.T if type(layer).__name__ == "Conv1D" else delta
    for name, value in state.items():
        if name.startswith("head."):
            base.get_parameter(name.removeprefix("head.")).copy_(value)
    return base(**BATCH).logits


@each_row
@each_scale
@each_model
def test_a_model_computes_what_the_state_promises(row: Row, kind: str, rslora: bool, request: pytest.FixtureRequest):
    path = request.getfixturevalue(kind)
    loaded, state = two_rounds(row, path, rslora)
    loaded.load(state)
    wanted = dense_logits(path, state, rslora)
    with torch.no_grad():
        assert (loaded.logits(BATCH) - wanted).norm() < 1e-5 * wanted.norm()
    if row.promise != "unchanged":
        bare = {n: v if n.startswith("head.") else torch.zeros_like(v) for n, v in state.items()}
        assert (dense_logits(path, bare, rslora) - wanted).norm() > 1e-2 * wanted.norm(), "the adapter does something"


@each_row
@each_scale
@each_model
def test_peft_loads_what_the_state_promises(
    row: Row, kind: str, rslora: bool, request: pytest.FixtureRequest, tmp_path: Path
):
    from peft import PeftModel

    path = request.getfixturevalue(kind)
    loaded, state = two_rounds(row, path, rslora)
    save_adapter(loaded, state, tmp_path / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(base_model(path)), tmp_path / "adapter").eval()
    wanted = dense_logits(path, state, rslora)
    with torch.no_grad():
        assert (again(**BATCH).logits - wanted).norm() < 1e-5 * wanted.norm()


# --- one strategy each
# ----------------------------------------------------------------------------------------------------------


def start() -> State:
    g = torch.Generator().manual_seed(0)
    state = {"head.w": torch.randn(3, 5, generator=g)}
    for module, (m, n) in SHAPES.items():
        state[f"{module}.lora_A"] = torch.randn(RANK, n, generator=g)
        state[f"{module}.lora_B"] = torch.randn(m, RANK, generator=g)
    return state


def drawn_updates(strategy, state: State, clients: int, seed: int = 1) -> dict[str, State]:
    g = torch.Generator().manual_seed(seed)
    names = strategy.sent_names(state)
    return {f"client-{i}": {n: torch.randn(state[n].shape, generator=g) for n in names} for i in range(clients)}


WEIGHTS = {"client-0": 30, "client-1": 10, "client-2": 60}


def test_head_policy_follows_the_configuration():
    strategy, state = make("fedsvd"), start()
    assert "head.w" in strategy.trained_names(state)
    object.__setattr__(strategy.config.train, "head", "freeze")
    assert "head.w" not in strategy.trained_names(state)


def test_fedsvd_period_and_warmup():
    def orthonormal_after(round_number: int, **options) -> bool:
        strategy, state = make("fedsvd", **options), start()
        A = after_round(
            strategy, state, drawn_updates(strategy, state, 2), {"client-0": 0.5, "client-1": 0.5}, round_number
        )["wide.q.lora_A"]
        return bool(torch.allclose(A @ A.T, torch.eye(RANK), atol=1e-5))

    assert [orthonormal_after(r) for r in (1, 2, 3)] == [True, True, True]
    assert [orthonormal_after(r, period=2) for r in (1, 2, 3, 4)] == [False, True, False, True]
    assert [orthonormal_after(r, warmup=2) for r in (1, 2, 3)] == [False, False, True]


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.name in ("fedex", "flora") or "refresh" in row.title], ids=lambda r: r.title
)
def test_a_residual_never_has_more_directions_than_there_are(row: Row):
    strategy, state = make(row.name, **dict(row.options)), start()
    for number in range(1, 8):
        updates = drawn_updates(strategy, state, 3, seed=number)
        state = after_round(strategy, state, updates, client_weights(WEIGHTS, "examples"), number)
    assert {m: state[f"{m}.residual_B"].shape[1] for m in SHAPES} == {m: min(shape) for m, shape in SHAPES.items()}


def test_flora_begins_every_round_with_a_new_adapter_that_does_nothing():
    strategy, state = make("flora"), start()
    weights = client_weights(WEIGHTS, "uniform")
    after = after_round(strategy, state, drawn_updates(strategy, state, 3), weights, 1)
    again = after_round(strategy, after, drawn_updates(strategy, after, 3), weights, 2)
    for module in modules(state):
        assert not after[f"{module}.lora_B"].any()
        A1, A2 = after[f"{module}.lora_A"].double(), again[f"{module}.lora_A"].double()
        assert torch.allclose(A1 @ A1.T, torch.eye(RANK, dtype=torch.float64), atol=1e-6)
        assert float(torch.linalg.matrix_norm(A1 @ A2.T, 2)) < 0.999, "another subspace"


def test_rolora_alternates_and_begins_with_b():
    strategy, state = make("rolora"), start()
    parts = [{n.rpartition(".")[2] for n in strategy.trained_names(state, r) if ".lora_" in n} for r in (1, 2, 3)]
    assert parts == [{"lora_B"}, {"lora_A"}, {"lora_B"}]
    assert strategy.trained_parts(strategy.config) == ["head", "lora_A", "lora_B"], "a privacy plan covers both"


def test_a_refreshed_fedsvd_keeps_the_largest_directions_and_opens_orthonormal_ones():
    strategy, state = make("fedsvd", refresh="{every=2, keep=2}"), start()
    weights = client_weights(WEIGHTS, "uniform")
    first = after_round(strategy, state, drawn_updates(strategy, state, 3), weights, 1)
    assert not [n for n in first if "residual" in n]
    second = after_round(strategy, first, drawn_updates(strategy, first, 3), weights, 2)
    for module in modules(state):
        A, B = second[f"{module}.lora_A"].double(), second[f"{module}.lora_B"]
        assert torch.allclose(A @ A.T, torch.eye(RANK, dtype=torch.float64), atol=1e-6)
        assert B[:, :2].any()
        assert not B[:, 2:].any()
        assert second[f"{module}.residual_B"].shape[1] == 2


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("fedex", ['run.dtype="bfloat16"'], "round away"),
        ("flora", ['run.dtype="bfloat16"'], "round away"),
        ("fedsvd", ['run.dtype="bfloat16"', "strategy.refresh={every=1}"], "round away"),
        ("fedsvd", ["strategy.refresh={every=1, keep=4}"], "leaves nothing to refresh"),
        ("fedex", ["privacy={unit='client', sigma=1.0, clip=1.0}", "strategy.weights=uniform"], "noises one mean"),
    ],
)
def test_meaningless_combinations_are_refused_with_the_reason(name: str, overrides: list[str], reason: str):
    text = f'[run]\nrounds=2\n[lora]\nrank={RANK}\nalpha=8\n[train]\nlr=1\nsteps=1\n[strategy]\nname="{name}"\n'
    config = RunConfig.parse(text, overrides)
    with pytest.raises(ConfigError, match=reason):
        AGGREGATORS[name](config)


if __name__ == "__main__":
    print(conformance.markdown([report(row) for row in ROWS]), end="")
