"""The cached prefix: the same training and the same scores as with the whole model, and
refused where it could not be.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedlab
from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.evaluate.classification import classify
from fedlab.models import hidden_states as prefix
from fedlab.models.adapters import initial_state
from fedlab.session import Session, open_session
from fedlab.train.cohort import train_cohort
from fedlab.train.local import LocalTraining, Trained
from fedlab.train.trainer import train_client

UPPER = ["lora.layers_to_transform=[1]", "lora.target_modules='all-linear'"]
MODELS = ["tiny_bert", "tiny_gpt2", "tiny_sentence_encoder"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLAB_CACHE", str(tmp_path / "cache"))
    open_session.cache_clear()
    return tmp_path / "cache"


def session_of(toml: str, *overrides: str) -> Session:
    return open_session(RunConfig.parse(toml, [*UPPER, *overrides]).to_toml())


def outcomes(session: Session) -> tuple[list[dict[str, torch.Tensor]], float]:
    """Updates of both trainers, and the loss on the test split."""
    state = initial_state(session.model, session.config.lora, 0)
    names = [n for n in state if n.endswith(("lora_A", "lora_B")) or n.startswith("head.")]
    plan = session.plan("client-0")
    alone = train_client(session.model, session.data, "client-0", state, names, session.config, 1, plan)
    together = train_cohort(
        session.model, session.data, [LocalTraining("client-0", state, plan)], names, session.config, 1
    )["client-0"]
    assert isinstance(together, Trained)
    session.model.load(state)
    return [alone.update, together.update], classify(
        session.model, session.data, session.data.test, session.config.evaluate
    )["loss"]


@pytest.mark.parametrize("model", MODELS)
def test_equal_to_the_whole_model(model: str, tiny_toml: str, tiny_bert: Path, request: pytest.FixtureRequest):
    toml = tiny_toml.replace(str(tiny_bert), str(request.getfixturevalue(model)))
    wanted, loss = outcomes(session_of(toml))
    session = session_of(toml, "run.cache_hidden_states=true")
    assert session.data.hidden_states is not None
    found, cached_loss = outcomes(session)
    assert cached_loss == pytest.approx(loss, rel=1e-5)
    for mine, whole in zip(found, wanted, strict=True):
        for name, value in whole.items():
            assert (mine[name] - value).norm() <= 1e-5 * value.norm(), name


def test_the_lower_blocks_are_not_computed(tiny_toml: str):
    session = session_of(tiny_toml, "run.cache_hidden_states=true")
    lowest: Any = session.model.lower[0][0]
    lowest.attention.forward = lambda *args, **kwargs: pytest.fail("the lowest block was computed")
    try:
        outcomes(session)
    finally:
        del lowest.attention.forward


def test_bfloat16_states_are_kept_as_their_bits(tiny_toml: str):
    session = session_of(tiny_toml, "run.cache_hidden_states=true", "run.dtype='bfloat16'")
    batch = session.data.batch(session.data.test[:3], 0)
    assert batch["hidden"].dtype == torch.bfloat16
    with torch.no_grad():
        started = session.model.logits(batch)
        del batch["hidden"]
        assert torch.allclose(started, session.model.logits(batch), atol=0.02)


def test_a_second_session_reads_what_is_there_and_a_damaged_part_is_made_again(
    tiny_toml: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prefix, "PART", 100)
    session = session_of(tiny_toml, "run.cache_hidden_states=true")
    whole = session.data.batch(session.data.test, 0)["hidden"].clone()
    parts = sorted((own_cache / "hidden-states").glob("*/*.npy"))
    assert len(parts) == 4
    parts[1].write_bytes(parts[1].read_bytes()[:-50])
    times = [path.stat().st_mtime_ns for path in parts]
    open_session.cache_clear()
    again = session_of(tiny_toml, "run.cache_hidden_states=true")
    assert torch.equal(again.data.batch(again.data.test, 0)["hidden"], whole)
    assert [path.stat().st_mtime_ns != t for path, t in zip(parts, times, strict=True)] == [False, True, False, False]


def test_a_part_that_another_process_works_at_is_waited_for(
    tiny_toml: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another holder of the lock stores the part; it is then read, not computed."""
    session = session_of(tiny_toml, "run.cache_hidden_states=true")
    (path,) = (own_cache / "hidden-states").glob("*/*.npy")
    rows = np.load(path)
    path.unlink()
    locked, release = threading.Event(), threading.Event()

    def other() -> None:
        with prefix._alone(path, wait=True):
            locked.set()
            release.wait(20)
            prefix._store(path, rows)

    thread = threading.Thread(target=other)
    thread.start()
    locked.wait(20)
    monkeypatch.setattr(prefix, "_compute", lambda *a: pytest.fail("computed twice"))
    threading.Timer(0.3, release.set).start()
    data = prefix.cache_hidden_states(session.model, session.data)
    thread.join()
    assert np.array_equal(data.hidden_states.parts[0], rows)


def test_other_weights_and_other_texts_have_other_entries(tiny_toml: str, own_cache: Path):
    session = session_of(tiny_toml, "run.cache_hidden_states=true")
    session_of(tiny_toml, "run.cache_hidden_states=true", "train.lr=0.1", "lora.rank=2")
    assert len(list((own_cache / "hidden-states").iterdir())) == 1
    session_of(tiny_toml, "run.cache_hidden_states=true", "data.max_length=8")
    assert len(list((own_cache / "hidden-states").iterdir())) == 2
    session = session_of(tiny_toml)
    with torch.no_grad():
        session.model.module.get_submodule("base_model.model.bert.embeddings.LayerNorm").weight.mul_(1.5)  # type: ignore[operator]
    prefix.cache_hidden_states(session.model, session.data)
    assert len(list((own_cache / "hidden-states").iterdir())) == 3


def test_nothing_to_cache_is_an_error(tiny_toml: str):
    with pytest.raises(ConfigError, match=r"lowest block has an adapter.*layers_to_transform"):
        session_of(tiny_toml, "run.cache_hidden_states=true", "lora.layers_to_transform=[0, 1]")


def test_a_full_disk_is_told_before_anything_is_computed(tiny_toml: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefix.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(prefix, "_compute", lambda *a: pytest.fail("computed"))
    with pytest.raises(ConfigError, match=r"run.cache_hidden_states needs .* GB free"):
        session_of(tiny_toml, "run.cache_hidden_states=true")


def test_a_model_whose_blocks_pass_on_more_is_refused(tiny_toml: str):
    """Here the upper block also reads what the lower one left on the side."""
    session = session_of(tiny_toml)
    encoder: Any = session.model.module.get_submodule("base_model.model.bert.encoder")
    lower, upper = encoder.layer
    kept: dict[str, torch.Tensor] = {}
    lower.attention.register_forward_hook(lambda *_: kept.update(mean=torch.rand(1)))
    handle = upper.register_forward_pre_hook(
        lambda _, args: (args[0] + kept.pop("mean", torch.full((1,), 9.0)), *args[1:])
    )
    try:
        with pytest.raises(ConfigError, match=r"pass on more than hidden states|changes what"):
            prefix.cache_hidden_states(session.model, session.data)
    finally:
        handle.remove()
        lower.attention._forward_hooks.clear()


def test_a_run_with_the_prefix_gives_the_same_accuracy_on_any_number_of_nodes(tiny_toml: str, tmp_path: Path):
    def run(name: str, *overrides: str) -> dict[str, Any]:
        return fedlab.simulate(RunConfig.parse(tiny_toml, [*UPPER, *overrides]), tmp_path / name, quiet=True).result

    plain, one, two = (
        run("plain"),
        run("one", "run.cache_hidden_states=true"),
        run("two", "run.cache_hidden_states=true", "run.nodes=2"),
    )
    assert one["adapter_digest"] == two["adapter_digest"]
    assert one["scores"] == pytest.approx(plain["scores"], rel=1e-4)


@pytest.mark.parametrize("toml", ["llama_toml", "causal_toml"])
def test_a_decoder_goes_on_from_what_is_kept(toml: str, request: pytest.FixtureRequest, monkeypatch):
    """Equal losses, and neither logits nor the blocks above are computed for what is kept."""
    upper = ["lora.layers_to_transform=[1]"]
    plain, kept = (
        open_session(
            RunConfig.parse(request.getfixturevalue(toml), [*upper, f"run.cache_hidden_states={on}"]).to_toml()
        )
        for on in ("false", "true")
    )
    pad = kept.model.tokenizer.pad_token_id
    with torch.no_grad():
        found = kept.model.objective.per_example_loss(kept.model, kept.data.batch(kept.data.test[:6], pad))
        wanted = plain.model.objective.per_example_loss(plain.model, plain.data.batch(plain.data.test[:6], pad))
    assert torch.allclose(found, wanted, rtol=1e-5)
    assert "hidden" in kept.data.batch(kept.data.test[:1], pad)
    module = kept.model.module.get_base_model()
    monkeypatch.setattr(module.model.layers[1], "forward", None)
    monkeypatch.setattr(module.lm_head, "forward", None)
    again = prefix._below(kept.model, kept.data.tokens.batch(kept.data.test[:2], pad), module.model.layers[0])
    assert again.shape[-1] == module.config.hidden_size
