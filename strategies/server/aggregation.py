"""The server's side of an aggregation: weights, the noise of client-level DP, and the rows of other tasks' heads."""

from __future__ import annotations

import logging

from fedlab.config import RunConfig
from fedlab.errors import RunFailed
from fedlab.lora.average import client_weights
from fedlab.lora.ranks import widen
from fedlab.lora.state import State, part_of
from fedlab.privacy.client_level import ClientPlan
from fedlab.privacy.noise import SecureNoise, SeededNoise
from fedlab.seeds import random_stream
from strategies.base import Round, ServerState, Strategy
from strategies.server.federation import Federation
from strategies.server.heads import keep_other_heads, sent_names, trained_names
from strategies.server.outcome import TrainOutcome
from strategies.server.shared_round import shared_change

logger = logging.getLogger("fedlab")


def aggregate(
    strategy: Strategy,
    federation: Federation,
    plan: ClientPlan | None,
    state: State,
    server_state: ServerState,
    outcome: TrainOutcome,
    number: int,
) -> tuple[State, ServerState]:
    """The new state, and the server's, after a round's updates.

    Args:
        strategy: what aggregates.
        federation: knows the sizes that clients declared; they are the weights.
        plan: of client-level DP; None if the server adds no noise. With it, one noised mean of the clipped updates
            takes the place of the clients' own; from there on all is post-processing.
        state: that the clients started from.
        server_state: the strategy's own, before the round.
        outcome: the usable updates; at least one unless ``plan`` is given. Under shared noise their sum, as one change.
        number: of the round.
    """
    config = strategy.config
    if plan is not None:
        mean = noised_mean(strategy, plan, state, outcome, number)
        updates, weights = {"everyone": mean}, {"everyone": 1.0}
    elif config.shared_noise:
        change = shared_change(config, federation, outcome, number)
        updates, weights = {"everyone": change}, {"everyone": 1.0}
    else:
        updates = outcome.updates
        sizes = {client: federation.clients[client].examples for client in updates}
        weights = client_weights(sizes, config.strategy.weights)
    after, server_state = strategy.aggregate(state, server_state, updates, weights, Round(number, outcome.unusable))
    return keep_other_heads(config, state, after), server_state


def noised_mean(strategy: Strategy, plan: ClientPlan, state: State, outcome: TrainOutcome, number: int) -> State:
    """The noised mean of the clipped updates: all that is kept of them under client-level DP."""
    noise = noise_source(strategy.config, plan, number)
    updates = {client: widen(update, state) for client, update in outcome.updates.items()}
    return plan.mean(updates, {name: state[name] for name in sent_names(strategy, state, number)}, noise)


def noise_source(config: RunConfig, plan: ClientPlan, number: int) -> SeededNoise | SecureNoise:
    """The server's noise of one round."""
    if plan.noise == "seeded":
        return SeededNoise(random_stream(config.sampling_seed, "noise", "server", number))
    return SecureNoise()


def warn_of_products(strategy: Strategy, state: State) -> None:
    """Say it where noise would be squared."""
    parts = {part_of(name) for name in trained_names(strategy, state)}
    if strategy.config.private and parts >= {"lora_A", "lora_B"}:
        told = "%s trains A and B at once under DP: their product squares the noise; ffa or fedsvd train B alone"
        logger.warning(told, strategy.config.strategy.name)


def check_moved(strategy: Strategy, state: State, outcome: TrainOutcome) -> bool:
    """Whether updates came that change something. Raises RunFailed for a first round whose every update is zero:
    nothing is being trained, whatever the loss says.
    """
    if not outcome.updates:
        return False
    watched = [n for n in sent_names(strategy, state) if strategy.trains == frozenset() or ".lora_" in n]
    if not any(bool(update[name].any()) for update in outcome.updates.values() for name in watched):
        raise RunFailed("no client changed the adapter in the first round; check train.lr and lora.target_modules")
    return True
