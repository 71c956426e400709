"""Principal inputs: against a dense SVD of activations that are collected one text at a time,
so without any padding.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import layer_norm

import fedlab
from fedlab.config import RunConfig
from fedlab.data.public import check_public, public_texts
from fedlab.errors import ConfigError
from fedlab.models import activations
from fedlab.models.activations import principal_inputs
from fedlab.models.adapters import draw_a, initial_state
from fedlab.models.loaded import PEFT_PREFIX, LoadedModel
from fedlab.models.loading import _build as build_uncached
from fedlab.objectives import Classification
from fedlab.run.launch import check_strategy
from fedlab.session import torch_threads

EVERYTHING = "lora.target_modules=['query', 'key', 'intermediate.dense', 'pooler.dense']"


def fresh(config: RunConfig) -> LoadedModel:
    objective = Classification(("fruit", "metal", "ocean"))
    return build_uncached.__wrapped__(config.model, config.lora, objective, config.run.dtype, "cpu")


@pytest.fixture
def public(tmp_path: Path, tiny_data: Path) -> Path:
    """Sixty texts of very different lengths, one per line."""
    rng, words = (
        np.random.default_rng(5),
        ["iron", "copper", "wave", "tide", "apple", "pear", "the", "of", "old", "deep"],
    )
    path = tmp_path / "public.txt"
    path.write_text("\n".join(" ".join(rng.choice(words, int(rng.integers(1, 20)))) for _ in range(60)) + "\n\n")
    return path


def collected(model: LoadedModel, texts: list[str]) -> dict[str, torch.Tensor]:
    """X [tokens, n] of each adapted module, float64, text after text: nothing is padded."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in model.scale}
    handles = [
        model.module.get_submodule(PEFT_PREFIX + name).register_forward_hook(
            lambda _, args, __, name=name: rows[name].append(args[0].double().reshape(-1, args[0].shape[-1]))
        )
        for name in rows
    ]
    model.load({n: torch.zeros(p.shape) for n, p in model.parameters.items()})
    with torch.no_grad():
        for text in texts:
            model.logits(dict(model.tokenizer(text, return_tensors="pt")))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values) for name, values in rows.items()}


def batches(model: LoadedModel, texts: list[str], size: int = 7):
    for start in range(0, len(texts), size):
        yield dict(model.tokenizer(texts[start : start + size], return_tensors="pt", padding=True))


def check_rows(rows: torch.Tensor, X: torch.Tensor, rank: int) -> None:
    """Row by row the singular vectors of X, where its singular values are apart (they are, here)."""
    _, values, Vt = torch.linalg.svd(X, full_matrices=False)
    assert float((values[:rank] / values[1 : rank + 1]).min()) > 1.001
    assert rows.shape == (rank, X.shape[1])
    assert torch.allclose((rows.double() * Vt[:rank]).sum(1).abs(), torch.ones(rank).double(), atol=1e-4)
    assert torch.allclose(rows @ rows.T, torch.eye(rank), atol=1e-5)
    assert bool((rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()), "signs are fixed"


def test_linear_modules_against_a_dense_svd(tiny_toml: str, public: Path):
    """Also the pooler, which sees one vector per text; lengths differ, so padding would show."""
    config = RunConfig.parse(tiny_toml, [EVERYTHING])
    model, texts = fresh(config), public.read_text().split("\n")[:-2]
    X = collected(model, texts)
    assert sum(len(x) == len(texts) for x in X.values()) == 1, "the pooler"
    found = principal_inputs(model, batches(model, texts), dict.fromkeys(X, 4))
    for name, rows in found.items():
        check_rows(rows, X[name], 4)
    padded = torch.cat([batch["attention_mask"] for batch in batches(model, texts, 60)])
    assert float(padded.float().mean()) < 0.8


def test_padding_would_have_changed_the_answer(tiny_toml: str, public: Path):
    """The check above can fail: with the mask switched off the rows are others."""
    config = RunConfig.parse(tiny_toml, [EVERYTHING])
    model, texts = fresh(config), public.read_text().split("\n")[:-2]
    X = collected(model, texts)
    name = next(n for n in X if n.endswith("layer.1.attention.self.query"))
    unmasked = ({**b, "attention_mask": torch.ones_like(b["attention_mask"])} for b in batches(model, texts))
    with pytest.raises(AssertionError):
        check_rows(principal_inputs(model, unmasked, {name: 4})[name], X[name], 4)


def test_conv1d_modules_against_a_dense_svd(tiny_toml: str, tiny_bert: Path, tiny_gpt2: Path, public: Path):
    config = RunConfig.parse(
        tiny_toml.replace(str(tiny_bert), str(tiny_gpt2)), ["lora.target_modules=['c_attn', 'c_fc', 'mlp.c_proj']"]
    )
    model, texts = fresh(config), public.read_text().split("\n")[:-2]
    X = collected(model, texts)
    assert {x.shape[1] for x in X.values()} == {32, 128}, "c_proj's input is the wide side"
    for name, rows in principal_inputs(model, batches(model, texts), dict.fromkeys(X, 4)).items():
        check_rows(rows, X[name], 4)


def test_the_sketch_against_the_exact_sum(tiny_toml: str, public: Path, monkeypatch: pytest.MonkeyPatch):
    """24 columns for inputs of 32 directions: the leading ones agree with the dense SVD to a thousandth of a radian or
    so.
    """
    config = RunConfig.parse(tiny_toml, [EVERYTHING, "lora.rank=2"])
    model, texts = fresh(config), public.read_text().split("\n")[:-2]
    X = collected(model, texts)
    exact = principal_inputs(model, batches(model, texts), dict.fromkeys(X, 2))
    monkeypatch.setattr(activations, "EXACT", 8)
    monkeypatch.setattr(activations, "SKETCH", 24)
    sketched = principal_inputs(model, batches(model, texts), dict.fromkeys(X, 2))
    assert any(not torch.equal(exact[n], sketched[n]) for n in exact), "this is the other way"
    for name, rows in sketched.items():
        captured = float((X[name] @ rows.double().T).norm() ** 2)
        best = float((X[name] @ exact[name].double().T).norm() ** 2)
        assert captured > 0.995 * best
        assert torch.allclose(rows @ rows.T, torch.eye(2), atol=1e-5)


def test_the_sketch_is_exact_for_few_directions():
    """X of rank 5 in 60 dimensions, 16 columns: nothing is lost."""
    g = torch.Generator().manual_seed(0)
    X = (
        torch.randn(200, 5, generator=g).double()
        * torch.tensor([9.0, 7, 5, 3, 2])
        @ torch.randn(5, 60, generator=g).double()
    )
    omega = torch.randn(60, 16, generator=g).double()
    rows, values = activations._nystrom(X.T @ (X @ omega), omega, 5)
    _, singular, Vt = torch.linalg.svd(X, full_matrices=False)
    assert torch.allclose(values.sqrt(), singular[:5], rtol=1e-8)
    assert torch.allclose((rows @ Vt[:5].T).abs(), torch.eye(5).double(), atol=1e-7)


@pytest.mark.parametrize("sketched", [False, True])
def test_few_tokens_are_completed(tiny_toml: str, sketched: bool, monkeypatch: pytest.MonkeyPatch):
    """Three tokens, rank 8: the first rows span what was seen, the others are orthonormal to them and the same every
    time.
    """
    if sketched:
        omega = torch.randn(32, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        monkeypatch.setattr(activations._SecondMoments, "omega", lambda self, n: omega)
    model = fresh(RunConfig.parse(tiny_toml, ["lora.rank=8"]))
    X = collected(model, ["iron"])
    found, again = (principal_inputs(model, batches(model, ["iron"]), dict.fromkeys(X, 8), seed=4) for _ in range(2))
    for name, rows in found.items():
        assert torch.equal(rows, again[name])
        assert torch.allclose(rows @ rows.T, torch.eye(8), atol=1e-5)
        x = X[name].float()
        assert torch.allclose(x @ rows[:3].T @ rows[:3], x, atol=1e-4)
    other = principal_inputs(model, batches(model, ["iron"]), dict.fromkeys(X, 8), seed=5)
    assert not all(torch.equal(other[n], found[n]) for n in found)


def test_modules_that_saw_nothing_are_refused(tiny_toml: str):
    model = fresh(RunConfig.parse(tiny_toml))
    name = next(iter(model.scale))
    with pytest.raises(ConfigError, match="saw no public token"):
        principal_inputs(model, [], {name: 4})


def test_inputs_without_token_positions_are_refused():
    """What an expert would be fed: some of the tokens, nobody knows which."""
    with pytest.raises(ConfigError, match="padding cannot be told"):
        activations.real_tokens("expert", torch.zeros(7, 32), torch.ones(2, 5, dtype=torch.bool))


def test_the_start_is_the_same_whatever_the_model_held(tiny_toml: str, public: Path):
    """A resumed run computes A again: after other work, on another number of threads, in the same bits."""
    config = RunConfig.parse(tiny_toml, ["lora.init_a=eva", f"lora.public='{public}'"])
    model = fresh(config)
    first = initial_state(model, config.lora, 3)
    g = torch.Generator().manual_seed(1)
    noise = {n: torch.randn(v.shape, generator=g) for n, v in first.items()}
    module = next(iter(model.scale))
    model.load({**noise, f"{module}.residual_B": torch.ones(32, 1), f"{module}.residual_A": torch.ones(1, 32)})
    with torch_threads(2):
        second = initial_state(model, config.lora, 3)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    X = collected(model, public_texts(config.lora))
    for name in model.scale:
        check_rows(first[f"{name}.lora_A"], X[name], 4)
        assert not first[f"{name}.lora_B"].any()


def test_a_run_starts_from_public_text(learnable_toml: str, public: Path, tmp_path: Path):
    """The server's A is the one that any other process computes (FFA trains B alone), and the privacy statement names
    the file.
    """
    overrides = ["lora.init_a=eva", f"lora.public='{public}'", "strategy.name=ffa", "run.rounds=1"]
    config = RunConfig.parse(learnable_toml, [*overrides, "privacy={unit='example', sigma=1.0, clip=1.0}"])
    run = fedlab.simulate(config, tmp_path / "run", quiet=True)
    assert str(public) in (run.path / "PRIVACY.md").read_text()
    saved = load_file(str(run.path / "adapter" / "adapter_model.safetensors"))
    model = fresh(config)
    start = initial_state(model, config.lora, config.run.seed)
    for name in model.scale:
        assert torch.equal(saved[f"{PEFT_PREFIX}{name}.lora_A.weight"], start[f"{name}.lora_A"])


def test_gaussian_rows():
    a = draw_a("random", (16, 4096), 0, "x")
    assert a.shape == (16, 4096)
    assert abs(float(a.std()) * 16 - 1) < 0.02, "standard deviation 1/r, as peft's gaussian"
    assert abs(float(layer_norm(a.flatten(), [a.numel()]).pow(4).mean()) - 3) < 0.15, "kurtosis of a Gaussian"
    assert torch.equal(a, draw_a("random", (16, 4096), 0, "x"))
    assert not torch.equal(a, draw_a("random", (16, 4096), 0, "y"))


def test_eva_needs_public_text(tiny_toml: str):
    with pytest.raises(ConfigError, match=r"needs lora\.public.*private release"):
        RunConfig.parse(tiny_toml, ["lora.init_a=eva"])
    with pytest.raises(ConfigError, match='set init_a = "eva"'):
        check_strategy(RunConfig.parse(tiny_toml, ["lora.public=x.txt"]))


def test_the_clients_data_is_not_public(tiny_toml: str, tiny_data: Path, public: Path):
    for path in (tiny_data, tiny_data.parent, tiny_data.parent / "." / tiny_data.name):
        with pytest.raises(ConfigError, match="the data of the clients"):
            check_public(RunConfig.parse(tiny_toml, ["lora.init_a=eva", f"lora.public='{path}'"]))
    check_public(RunConfig.parse(tiny_toml, ["lora.init_a=eva", f"lora.public='{public}'"]))
    check_public(RunConfig.parse(tiny_toml))


def test_public_texts_of_every_kind(tiny_toml: str, tmp_path: Path):
    def read(path: Path, *more: str) -> list[str]:
        return public_texts(RunConfig.parse(tiny_toml, ["lora.init_a=eva", f"lora.public='{path}'", *more]).lora)

    texts = [f"text {i}" for i in range(10)]
    (tmp_path / "a.txt").write_text("\n".join(["", *texts, "  "]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"label": "x", "text": t}) + "\n" for t in texts))
    (tmp_path / "c.csv").write_text("sentence,number\n" + "".join(f"{t},{i}\n" for i, t in enumerate(texts)))
    for name in ("a.txt", "b.jsonl", "c.csv"):
        assert read(tmp_path / name) == texts
    assert read(tmp_path / "a.txt", "lora.public_texts=3") == ["text 0", "text 3", "text 6"], "spread over the file"
    (tmp_path / "d.jsonl").write_text('{"one": "a", "two": "b"}\n')
    (tmp_path / "e.txt").write_text("\n \n")
    (tmp_path / "f.txt").write_bytes(b"\xff\xfe\x00")
    for name, expected in (
        ("d.jsonl", "it has 'one', 'two'"),
        ("e.txt", "holds no text"),
        ("f.txt", "UTF-8"),
        ("none", "no such file"),
    ):
        with pytest.raises(ConfigError, match=expected):
            read(tmp_path / name)
