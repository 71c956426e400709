"""Core coordinates in a shared pass: B trained in the coordinates of ``basis_U``, against autograd and a loop over
single texts.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedlab.config import RunConfig
from fedlab.continual.subspace import complement
from fedlab.lora.state import State, modules
from fedlab.lora.svd import orthonormal_rows
from fedlab.models.adapters import initial_state
from fedlab.privacy.plan import DPPlan
from fedlab.privacy.sampling import fixed_batches
from fedlab.seeds import random_stream
from fedlab.session import Session, open_session
from fedlab.train.cohort import penalty_gradient, train_cohort
from fedlab.train.local import LocalTraining


def session_of(toml: str) -> Session:
    """Steps long enough that an update is more than the spacing of float32 around B."""
    return open_session(
        RunConfig.parse(toml, ["privacy={unit='none'}", "train.momentum=0.0", "train.lr=2.0"]).to_toml()
    )


def core_state(session: Session, left: bool) -> State:
    """Bases of different ranks per module, as after a few tasks; C small but not zero."""
    g = torch.Generator().manual_seed(0)
    state = initial_state(session.model, session.config.lora, 0)
    for i, module in enumerate(modules(state)):
        m, n = len(state[f"{module}.lora_B"]), state[f"{module}.lora_A"].shape[1]
        A = complement(orthonormal_rows(torch.randn(5 + i, n, generator=g)))
        p = m
        if left:
            state[f"{module}.basis_U"] = complement(orthonormal_rows(torch.randn(7 + i, m, generator=g)))
            p = m - 7 - i
        state[f"{module}.lora_A"] = A
        state[f"{module}.lora_B"] = 0.01 * torch.randn(p, len(A), generator=g)
    return state


def reference(session: Session, state: State, client: str, names: list[str], plan: DPPlan | None) -> State:
    """The client's change by plain autograd through the model: gradients of the outer B, projected on U, one text at a
    time.
    """
    model, data, config = session.model, session.data, session.config
    now = {name: value.clone() for name, value in state.items()}
    indices = data.train(client)
    draws = random_stream(config.run.seed, "batches", client, 2)
    steps = plan.steps if plan else config.train.steps
    fixed = None if plan else fixed_batches(len(indices), config.train.batch_size, steps, draws)
    noise = plan.noise_source(random_stream(config.run.seed, "noise", client, 2)) if plan else None
    for step in range(steps):
        batch = indices[plan.batch(draws) if plan else fixed[step]]
        total = {name: torch.zeros(now[name].shape, dtype=torch.float64) for name in names}
        for text in batch:
            model.load(now)
            for name in names:
                model.parameters[name].requires_grad_(True)
                model.parameters[name].grad = None
            rows = data.batch(text[None], model.tokenizer.pad_token_id)
            cross_entropy(model.logits(rows), rows["labels"]).backward()
            mine = {}
            for name in names:
                gradient = model.parameters[name].grad.double()
                basis = state.get(name.replace("lora_B", "basis_U")) if name.endswith("lora_B") else None
                mine[name] = gradient if basis is None else basis.double() @ gradient
            norm = sum(float(g.square().sum()) for g in mine.values()) ** 0.5
            for name in names:
                total[name] += mine[name] * (min(1.0, plan.clip / norm) if plan else 1.0)
        gradients = plan.privatise(total, noise) if plan else {name: g / len(batch) for name, g in total.items()}
        for name in names:
            rate = config.train.lr if not name.startswith("head.") else config.train.head_lr or config.train.lr
            now[name] = now[name] - (rate * gradients[name]).float()
    model.module.requires_grad_(False)
    return {name: now[name] - state[name] for name in names}


@pytest.mark.parametrize("private", [False, True], ids=["plain", "dp"])
@pytest.mark.parametrize("left", [True, False], ids=["two-sided", "inputs"])
@pytest.mark.parametrize("together", [1, 3])
def test_a_shared_pass_is_autograd_in_core_coordinates(together: int, left: bool, private: bool, tiny_toml: str):
    session = session_of(tiny_toml)
    state = core_state(session, left)
    names = sorted(n for n in state if n.endswith("lora_B") or n.startswith("head."))
    clients = session.data.clients[:together]
    plans = {c: DPPlan(session.data.size(c), 6, 2, 1.0, 0.3, 1e-5, 3, "seeded") if private else None for c in clients}
    found = train_cohort(
        session.model, session.data, [LocalTraining(c, state, plans[c]) for c in clients], names, session.config, 2
    )
    for client in clients:
        wanted = reference(session, state, client, names, plans[client])
        for name in names:
            error = float((found[client].update[name] - wanted[name]).norm())
            assert error <= 1e-4 * float(wanted[name].norm()), (client, name)


def test_the_penalty_is_the_gradient_of_what_it_penalises():
    g = torch.Generator().manual_seed(0)
    A, past = torch.randn(2, 3, 9, generator=g, requires_grad=True), torch.randn(4, 9, generator=g)
    (0.7 * (A @ past.mT).abs().sum()).backward()
    assert torch.allclose(penalty_gradient(A.detach(), past, 0.7), A.grad, atol=1e-6)
