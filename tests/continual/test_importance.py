"""Layer importance on public texts, and what of a layer is then preserved."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fedlab
from fedlab.config import RunConfig
from fedlab.continual.importance import importance, layer_importance, preserved_ranks
from fedlab.data.public import check_public
from fedlab.errors import ConfigError
from fedlab.models.activations import public_batches
from fedlab.models.loaded import PEFT_PREFIX
from fedlab.run.launch import check_strategy
from fedlab.session import open_session


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def public(tmp_path: Path) -> Path:
    path = tmp_path / "public.txt"
    path.write_text(
        "\n".join(["apple pear with iron", "the tide of the reef", "old zinc", "some very small thing near a wave"])
    )
    return path


def test_importance_is_a_mean_cosine_on_the_shared_coordinates():
    X = random(50, 8)
    assert importance(X, X) == pytest.approx(1)
    assert importance(X, -X) == pytest.approx(-1)
    assert importance(X, torch.cat([X, random(50, 4, seed=1)], 1)) == pytest.approx(1)
    assert importance(torch.zeros(3, 8), X[:3]) == 0


def test_preserved_ranks_are_clamped_and_defined_for_every_importance():
    shapes = {"a": (10, 10), "b": (10, 20), "c": (1, 9), "d": (10, 10)}
    assert preserved_ranks(shapes) == {"a": 8, "b": 8, "c": 0, "d": 8}
    some = preserved_ranks(shapes, {"a": 0.9, "b": 0.5, "c": 0.1, "d": -0.3})
    assert some["a"] == 9, "r > 1 in the paper; one direction is left to train"
    assert some["d"] == 1, "a negative importance counts as 0: the lower ratio"
    assert preserved_ranks(shapes, dict.fromkeys(shapes, -1.0)) == preserved_ranks(shapes)
    with pytest.raises(ValueError, match="low"):
        preserved_ranks(shapes, low=0.9, high=0.5)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            preserved_ranks(shapes, dict.fromkeys(shapes, bad))


def test_a_layers_importance_is_the_mean_over_single_texts(tiny_toml: str, public: Path):
    session = open_session(RunConfig.parse(tiny_toml, ["lora.init_a=eva", f"lora.public='{public}'"]).to_toml())
    model, total, count = session.model, dict.fromkeys(session.model.scale, 0.0), 0
    found = layer_importance(model, public_batches(model, session.config.lora))
    for text in public.read_text().splitlines():  # one text at a time: no padding anywhere
        batch = model.tokenizer(text, return_tensors="pt")
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        handles = [
            model.module.get_submodule(PEFT_PREFIX + m).register_forward_hook(
                lambda _, x, y, m=m, seen=seen: seen.__setitem__(m, (x[0][0], y[0]))
            )
            for m in model.scale
        ]
        with torch.no_grad():
            model.logits({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
        for handle in handles:
            handle.remove()
        count += batch["input_ids"].shape[1]
        for m, (x, y) in seen.items():
            total[m] += sum(float(a @ b / (a.norm() * b.norm())) for a, b in zip(x.double(), y.double(), strict=True))
    assert found == pytest.approx({m: value / count for m, value in total.items()}, abs=1e-6)
    with pytest.raises(ConfigError, match="saw no token"):
        layer_importance(model, [])


def test_osft_preserves_more_of_layers_that_matter(stream_toml: str, public: Path, tmp_path: Path):
    settings = ["strategy={name='osft', preserve=0.4, importance=true}", f"lora.public='{public}'"]
    run = fedlab.simulate(RunConfig.parse(stream_toml, settings), tmp_path / "run", quiet=True)
    assert run.result["leak"] < 1e-5
    task = tmp_path / "run" / "task-0-wet"
    bases = [load_file(str(path)) for path in (task / "bases").glob("*.safetensors")]
    sizes = {name: len(value) for basis in bases for name, value in basis.items() if name.endswith(".lora_A")}
    session = open_session(RunConfig.load(task / "run.toml").to_toml())
    fresh = fedlab.models.adapters.initial_state(session.model, session.config.lora, session.config.run.seed)
    session.model.load(fresh)
    scores = layer_importance(session.model, public_batches(session.model, session.config.lora))
    kept = preserved_ranks(dict.fromkeys(scores, (32, 32)), scores, 0.1, 0.4)
    assert len(set(kept.values())) > 1
    assert sizes == {f"{name}.lora_A": 32 - k for name, k in kept.items()}
    assert json.loads((task / "result.json").read_text())["status"] == "completed"


def test_importance_needs_public_texts_that_are_nobodys_data(
    stream_toml: str, stream_data: Path, public: Path, tmp_path: Path
):
    osft = "strategy={name='osft', importance=true}"
    with pytest.raises(ConfigError, match=r"importance = true needs lora\.public"):
        fedlab.simulate(RunConfig.parse(stream_toml, [osft]), tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match=r"lora\.public is read for"):
        check_strategy(RunConfig.parse(stream_toml, ["strategy={name='osft'}", f"lora.public='{public}'"]))
    elsewhere = stream_toml.replace(str(stream_data), str(public))
    assert elsewhere.count("[[tasks]]") == 2
    hidden = elsewhere.replace('name = "hard"', f'name = "hard"\ndata = {{path = "{stream_data}"}}')
    with pytest.raises(ConfigError, match="the data of the clients"):
        check_public(RunConfig.parse(hidden, [osft, f"lora.public='{stream_data}'"]))
