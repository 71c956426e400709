"""``strategy.robust`` and ``strategy.server``: on every strategy that works from a mean, refused with a reason
elsewhere.
"""

from __future__ import annotations

import pydantic
import pytest
import torch

from fedlab.config import RunConfig
from fedlab.errors import ConfigError, RunFailed
from fedlab.lora.robust import RULES
from fedlab.lora.state import State, modules
from fedlab.lora.svd import orthonormal_rows
from strategies import AGGREGATORS
from strategies.base import Round
from strategies.options import MeanOptions, Robust
from strategies.server.outcome import TrainOutcome

CLIENTS = 10
LINEAR = sorted(name for name, strategy in AGGREGATORS.items() if issubclass(strategy.Options, MeanOptions))
OPTIONS = {
    "coordinate_median": "",
    "geometric_median": "",
    "krum": ", byzantine=3",
    "multi_krum": ", byzantine=3",
    "bulyan": ", byzantine=1",
    "norm_bounded_mean": ", bound=2.0",
    "trimmed_mean": ", trim=0.3",
}


def make(name: str, *overrides: str):
    text = f"[run]\nrounds=3\n[lora]\nrank=3\nalpha=6\n[data]\nclients={CLIENTS}\n[train]\nlr=1\nsteps=1\n"
    text += f'[strategy]\nname="{name}"\n'
    config = RunConfig.parse(text, overrides)
    return AGGREGATORS[name](config)


def after_round(strategy, state: State, updates, weights, number: int = 1) -> State:
    """The state after a round of a server that remembers nothing yet."""
    return strategy.aggregate(state, strategy.init(state), updates, weights, Round(number))[0]


def start() -> State:
    g = torch.Generator().manual_seed(0)
    return {
        n: torch.randn(s, generator=g) for n, s in {"q.lora_A": (3, 8), "q.lora_B": (6, 3), "head.w": (2, 6)}.items()
    }


def updates_around(strategy, state: State, spread: float, round_number: int = 1) -> dict[str, State]:
    g = torch.Generator().manual_seed(round_number)
    names = strategy.sent_names(state, round_number)
    middle = {n: torch.randn(state[n].shape, generator=g) for n in names}
    return {
        f"client-{i}": {n: middle[n] + spread * torch.randn(middle[n].shape, generator=g) for n in names}
        for i in range(CLIENTS)
    }


def weights() -> dict[str, float]:
    return {f"client-{i}": 1 / CLIENTS for i in range(CLIENTS)}


def test_which_strategies_have_them():
    assert LINEAR == ["fed-sb", "fedavg", "fedsa", "fedsvd", "ffa", "head", "rolora"]
    assert OPTIONS.keys() == RULES.keys()


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("rule", RULES)
def test_a_hostile_minority_does_not_move_a_robust_strategy_far(name: str, rule: str):
    robust, plain, state = make(name, f"strategy.robust={{rule='{rule}'{OPTIONS[rule]}}}"), make(name), start()
    updates = updates_around(robust, state, spread=0.01)
    honest = after_round(plain, state, updates, weights(), 1)
    hostile = 1 if rule == "bulyan" else 3
    for i in range(hostile):
        updates[f"client-{i}"] = {n: -50 * v for n, v in updates[f"client-{i}"].items()}
    moved, saved = after_round(plain, state, updates, weights(), 1), after_round(robust, state, updates, weights(), 1)
    for module in modules(state):

        def product(s: State, module: str = module) -> torch.Tensor:
            return s[f"{module}.lora_B"].double() @ s[f"{module}.lora_A"].double()

        size = product(honest).norm()
        if any(".lora_" in n for n in robust.sent_names(state)):
            assert (product(moved) - product(honest)).norm() > size
            if rule != "norm_bounded_mean":  # bounded, yet biased
                assert (product(saved) - product(honest)).norm() < 0.05 * size


def test_clients_that_gave_themselves_away_are_feared_no_more():
    """Krum among ten of which three may be hostile; the server excluded all three for NaN, and seven honest ones are
    left.
    """
    strategy, state = make("ffa", "strategy.robust={rule='krum', byzantine=3}"), start()
    updates = {
        c: u for c, u in updates_around(strategy, state, 0.1).items() if c not in ("client-0", "client-1", "client-2")
    }
    left = dict.fromkeys(updates, 1 / 7)
    with pytest.raises(RunFailed, match="7"):
        after_round(strategy, state, updates, left, 1)
    after, _ = strategy.aggregate(state, strategy.init(state), updates, left, Round(1, unusable=3))
    assert any(torch.allclose(after["q.lora_B"], state["q.lora_B"] + u["q.lora_B"]) for u in updates.values())
    gone = ("client-0", "client-1", "client-2")
    silent, nan = "no reply within 60 s", "unusable update: head.w holds NaN or infinite values"
    assert TrainOutcome(excluded=dict.fromkeys(gone, silent)).unusable == 0
    assert TrainOutcome(excluded=dict.fromkeys(gone, nan)).unusable == 3


def test_a_server_optimiser_moves_by_what_it_makes_of_the_mean():
    plain, state = make("ffa"), start()
    momentum = make("ffa", "strategy.server={optimizer='momentum', beta1=0.5, lr=2.0}")
    updates = updates_around(plain, state, 1.0)
    mean = {n: after_round(plain, state, updates, weights(), 1)[n] - state[n] for n in plain.sent_names(state)}
    first, kept = momentum.aggregate(state, momentum.init(state), updates, weights(), Round(1))
    second, _ = momentum.aggregate(first, kept, updates, weights(), Round(2))
    for n in mean:
        assert torch.allclose(first[n] - state[n], 2 * mean[n], atol=1e-5)
        assert torch.allclose(second[n] - first[n], 2 * 1.5 * mean[n], atol=1e-5)


def test_fedsvd_with_server_momentum_is_ffa_with_server_momentum():
    """The momentum turns with the basis, so both make the same change of weights in every round."""
    server = "strategy.server={optimizer='momentum', beta1=0.9, lr=0.7}"
    svd, ffa, state = make("fedsvd", server), make("ffa", server), start()
    state["q.lora_A"] = orthonormal_rows(state["q.lora_A"])
    states = {"svd": dict(state), "ffa": dict(state)}
    kept: dict[str, State] = {"svd": {}, "ffa": {}}
    for number in range(1, 7):
        g = torch.Generator().manual_seed(number)
        drawn = {
            f"client-{i}": torch.randn(6, 8, generator=g, dtype=torch.float64) for i in range(CLIENTS)
        }  # gradients of the weight
        for key, strategy in (("svd", svd), ("ffa", ffa)):
            A = states[key]["q.lora_A"].double()
            updates = {c: {"q.lora_B": (G @ A.mT).float(), "head.w": torch.zeros(2, 6)} for c, G in drawn.items()}
            states[key], kept[key] = strategy.aggregate(states[key], kept[key], updates, weights(), Round(number))
        products = [s["q.lora_B"].double() @ s["q.lora_A"].double() for s in states.values()]
        assert (products[0] - products[1]).norm() < 1e-5 * products[1].norm()
    assert not torch.allclose(states["svd"]["q.lora_A"], states["ffa"]["q.lora_A"], atol=0.1), "the bases do differ"


@pytest.mark.parametrize("kind", ["momentum", "adam", "yogi"])
def test_moments_are_what_the_server_keeps(kind: str):
    one, state = make("ffa", f"strategy.server={{optimizer='{kind}'}}"), start()
    after, kept = one.aggregate(state, one.init(state), updates_around(one, state, 1.0), weights(), Round(1))
    assert {name.partition("/")[0] for name in kept} == ({"first"} if kind == "momentum" else {"first", "second"})
    updates = updates_around(one, state, 1.0, 2)
    wanted, _ = one.aggregate(after, kept, updates, weights(), Round(2))
    fresh, _ = one.aggregate(after, one.init(after), updates, weights(), Round(2))
    assert any(not torch.equal(wanted[n], fresh[n]) for n in wanted), "forgetting it changes something"


@pytest.mark.parametrize(
    ("name", "override", "reason"),
    [
        ("ffa", "strategy.robust={rule='krum', byzantine=5}", "10 clients per round"),
        ("ffa", "strategy.robust={rule='trimmed_mean', trim=0.01}", "drops none"),
        ("fedsvd", "strategy.server={optimizer='adam'}", "second moments"),
        ("fedsvd", "strategy.server={optimizer='yogi'}", "second moments"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(name: str, override: str, reason: str):
    with pytest.raises(ConfigError, match=reason):
        make(name, override)


def test_robust_rules_are_refused_where_the_server_noises_the_mean():
    client_level = ["privacy={unit='client', sigma=1.0, clip=1.0}", "strategy.weights=uniform"]
    with pytest.raises(ConfigError, match="calibrated to a mean"):
        make("ffa", "strategy.robust={rule='coordinate_median'}", *client_level)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rule": "krum"}, "needs byzantine"),
        ({"rule": "trimmed_mean"}, "needs trim"),
        ({"rule": "krum", "byzantine": 1, "trim": 0.1}, "has no trim"),
        ({"rule": "coordinate_median", "keep": 3}, "has no keep"),
        ({"rule": "mode"}, "rule"),
    ],
)
def test_options_that_a_rule_lacks_or_needs(options: dict, reason: str):
    with pytest.raises(pydantic.ValidationError, match=reason):
        Robust(**options)
