import copy
import pickle

import pytest
import torch
from torch import nn

from fedlab.continual.core import CoreLinear, wrap
from fedlab.continual.subspace import complement, leading_triplets, leak, project
from fedlab.errors import ConfigError

M, N, K = 24, 20, 8


def layer(seed: int = 0, m: int = M, n: int = N) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(n, m)


def osft(base: nn.Linear, k: int = K) -> tuple[CoreLinear, torch.Tensor, torch.Tensor]:
    top = leading_triplets(base.weight, k)
    left, right = top.left.float(), top.right.float()
    return CoreLinear(base, complement(left), complement(right)), left, right


def train(core: nn.Module, steps: int, lr: float = 1e-2, seed: int = 1) -> None:
    torch.manual_seed(seed)
    X, Y = torch.randn(64, N), torch.randn(64, M)
    optimizer = torch.optim.AdamW([p for p in core.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        (core(X) - Y).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "carry", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["same", "deepcopy", "pickle"]
)
def test_nothing_leaks_after_250_steps_of_adamw(carry):
    base = layer()
    before = base.weight.detach().clone()
    core, left, right = osft(base)
    train(core, 50)
    core = carry(core)
    train(core, 200)
    assert float(core.delta.detach().norm()) > 0.1, "it did learn"
    assert leak(core.delta.detach(), left, right) <= 1e-5
    assert torch.equal(core.weight, before), "the frozen weight is what it was"


def test_an_optimiser_on_projected_gradients_leaks():
    """The trap that core coordinates avoid: AdamW rescales a projected gradient entry by entry, and out of the
    subspace.
    """
    base = layer()
    top = leading_triplets(base.weight, K)
    left, right = top.left.float(), top.right.float()
    before = base.weight.detach().clone()
    base.weight.register_hook(lambda g: project(g, left, right))
    train(base, 100)
    assert leak(base.weight.detach() - before, left, right) > 0.05


def test_a_protected_input_gives_the_same_output_after_many_tasks():
    base = layer()
    protected = torch.zeros(0, N)
    x = torch.randn(5, 3) @ torch.linalg.qr(torch.randn(N, 3)).Q.mT
    wanted = base(x).detach()
    for task in range(5):
        protected = torch.linalg.qr(
            torch.cat([protected, x[:3] if task == 0 else torch.randn(2, N)]).mT.double()
        ).Q.mT.float()
        core = CoreLinear(base, None, complement(protected))
        train(core, 60, seed=task)
        base = core.merged()
        assert torch.allclose(base(x), wanted, atol=2e-5)
    assert float((base.weight - layer().weight).detach().norm()) > 0.1


def test_averaging_cores_is_averaging_weights():
    cores = []
    for seed in range(4):
        core, _, _ = osft(layer())
        train(core, 20, seed=seed)
        cores.append(core)
    mean = copy.deepcopy(cores[0])
    with torch.no_grad():
        mean.core.copy_(torch.stack([c.core for c in cores]).mean(0))
    assert torch.allclose(mean.delta, torch.stack([c.delta for c in cores]).mean(0), atol=1e-6)


def test_the_norm_of_the_core_is_the_norm_of_the_change():
    core, _, _ = osft(layer())
    train(core, 20)
    assert float(core.core.detach().norm()) == pytest.approx(float(core.delta.detach().norm()), rel=1e-5)


def test_gradients_and_steps_are_those_of_projected_gradient_descent_on_the_weight():
    """float64, SGD: C in core coordinates walks exactly where two-sided projected gradient descent on W walks."""
    base = layer().double()
    top = leading_triplets(base.weight, K)
    core = CoreLinear(base, complement(top.left), complement(top.right))
    X, Y = torch.randn(30, N).double(), torch.randn(30, M).double()
    W = base.weight.detach().clone()
    for _ in range(25):
        core.zero_grad()
        (core(X) - Y).square().sum().backward()
        W = W - 1e-3 * project(2 * (X @ W.mT + base.bias.detach() - Y).mT @ X, top.left, top.right)
        with torch.no_grad():
            core.core -= 1e-3 * core.core.grad
    assert torch.allclose(core.weight + core.delta, W, atol=1e-12)
    assert all(p is core.core for p in core.parameters())


def test_a_rank_deficient_weight_still_learns():
    base = layer()
    with torch.no_grad():
        base.weight.copy_(base.weight[:, :3] @ torch.randn(3, N))
    core, _, _ = osft(base)
    train(core, 1, lr=0.1)
    assert float(core.core.detach().abs().max()) > 0.05, (
        "OSFT's factors have no gradient where the singular values are zero"
    )


@pytest.mark.parametrize(("m", "n"), [(1, 9), (9, 1)])
def test_thin_layers(m, n):
    core = CoreLinear(layer(0, m, n), None, torch.eye(n))
    core(torch.randn(3, n)).sum().backward()
    assert float(core.core.grad.norm()) > 0


def test_identity_and_ties_have_a_defined_outcome():
    base = nn.Linear(12, 12)
    with torch.no_grad():
        base.weight.copy_(torch.eye(12))
    core, left, right = osft(base, 5)
    assert torch.equal(osft(base, 5)[2], right), (
        "which of the equal directions is protected does not change from call to call"
    )
    x = torch.randn(2, 12)
    assert torch.allclose(core(x), base(x))
    with torch.no_grad():
        core.core.normal_()
    assert leak(core.delta.detach(), left, right) < 1e-6


def test_wrap_freezes_replaces_and_refuses_what_is_tied_or_not_linear():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()
            self.c = nn.Linear(4, 4)
            self.c.weight = self.b.weight

    model = Tied()
    found = wrap(model, {"a": (None, torch.eye(4))})
    assert model.a is found["a"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["a.core"]
    for name, reason in [("b", "tied"), ("act", "ReLU"), ("nowhere", "no module")]:
        with pytest.raises(ConfigError, match=reason):
            wrap(model, {name: (None, torch.eye(4))})


def test_bases_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="for a 24×20 layer"):
        CoreLinear(layer(), None, torch.eye(7))
    with pytest.raises(ValueError, match=r"left .* not orthonormal"):
        CoreLinear(layer(), 2 * torch.eye(M), torch.eye(N))
