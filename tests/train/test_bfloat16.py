"""A bfloat16 base: what is trained beside it is what float32 arithmetic on the same rounded base trains, up to
bfloat16's rounding.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlab.config import RunConfig
from fedlab.lora.state import State
from fedlab.models.adapters import initial_state
from fedlab.models.attention import NAME
from fedlab.models.loading import _build
from fedlab.privacy.plan import DPPlan
from fedlab.session import Session, open_session
from fedlab.train.cohort import train_cohort
from fedlab.train.local import LocalTraining
from fedlab.train.trainer import train_client

ROUNDING = 2.0**-8  # of one bfloat16 operation
MODELS = ["tiny_bert", "tiny_gpt2", "tiny_sentence_encoder"]


def session_of(toml: str, *overrides: str) -> Session:
    _build.cache_clear()  # a model of its own: one is rounded below
    return open_session(
        RunConfig.parse(toml, ["lora.target_modules='all-linear'", "train.momentum=0.0", *overrides]).to_toml()
    )


def moved_state(session: Session) -> State:
    g = torch.Generator().manual_seed(0)
    return {
        n: v + 0.1 * torch.randn(v.shape, generator=g)
        for n, v in initial_state(session.model, session.config.lora, 0).items()
    }


def members_of(session: Session, state: State) -> list[LocalTraining]:
    return [
        LocalTraining(c, state, DPPlan(session.data.size(c), 12, 2, 1e-9, 0.3, 1e-5, 3, "seeded"))
        for c in session.data.clients
    ]


def distance(one: State, other: State) -> float:
    """Relative, over all tensors together."""
    error = sum(float((one[n] - other[n]).double().square().sum()) for n in one) ** 0.5
    return error / sum(float(other[n].double().square().sum()) for n in other) ** 0.5


@pytest.mark.parametrize("trained", [("lora_B", "head"), ("lora_A", "lora_B", "head")], ids=["B", "A and B"])
@pytest.mark.parametrize("name", MODELS)
def test_updates_are_float32s_up_to_rounding(
    name: str, trained: tuple[str, ...], tiny_toml: str, tiny_bert: Path, request
):
    toml = tiny_toml.replace(str(tiny_bert), str(request.getfixturevalue(name)))
    found = {}
    for dtype in ("float32", "bfloat16"):
        session = session_of(toml, f"run.dtype={dtype}", "lora.dropout=0.1")
        state = moved_state(session)
        with torch.no_grad():  # the same base for both
            for parameter in session.model.module.parameters():
                if all(parameter is not own for own in session.model.parameters.values()):
                    parameter.copy_(parameter.bfloat16())
        names = sorted(n for n in state if n.startswith("head.") or n.endswith(tuple(f".{part}" for part in trained)))
        found[dtype] = train_cohort(session.model, session.data, members_of(session, state), names, session.config, 1)
    _build.cache_clear()
    for client, mine in found["bfloat16"].items():
        wanted = found["float32"][client]
        assert all(value.dtype == torch.float32 for value in mine.update.values())
        assert 0 < distance(mine.update, wanted.update) < 12 * ROUNDING, client
        assert mine.steps == wanted.steps


@pytest.mark.parametrize("name", MODELS)
def test_a_shared_pass_is_a_client_alone_through_peft(name: str, tiny_toml: str, tiny_bert: Path, request):
    toml = tiny_toml.replace(str(tiny_bert), str(request.getfixturevalue(name)))
    session = session_of(toml, "run.dtype=bfloat16")
    state = moved_state(session)
    names = sorted(n for n in state if n.endswith(".lora_B") or n.startswith("head."))
    members = members_of(session, state)
    found = train_cohort(session.model, session.data, members, names, session.config, 1)
    for member in members:
        alone = train_client(session.model, session.data, member.client, state, names, session.config, 1, member.plan)
        assert distance(found[member.client].update, alone.update) < 12 * ROUNDING
    _build.cache_clear()


def test_attention_is_computed_in_float32(tiny_toml: str):
    wide, narrow = (session_of(tiny_toml, f"run.dtype={dtype}").model for dtype in ("float32", "bfloat16"))
    assert narrow.module.config._attn_implementation == NAME
    assert wide.module.config._attn_implementation == "sdpa"
    _build.cache_clear()
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, *args, **options) -> torch.Tensor:
        seen.append(query.dtype)
        return original(query, *args, **options)

    batch = {"input_ids": torch.tensor([[2, 9, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        narrow.logits(batch)
    assert set(seen) == {torch.float32}


def test_padding_is_masked_in_float32_attention(tiny_toml: str):
    model = session_of(tiny_toml, "run.dtype=bfloat16").model
    short = {"input_ids": torch.tensor([[2, 9, 3]]), "attention_mask": torch.tensor([[1, 1, 1]])}
    padded = {"input_ids": torch.tensor([[2, 9, 3, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    with torch.no_grad():
        assert torch.allclose(model.logits(short), model.logits(padded), rtol=8 * ROUNDING, atol=8 * ROUNDING)
    _build.cache_clear()
