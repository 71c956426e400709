"""What is said beside how a run ended: warnings from what the server knows, in ``fedlab.run.cautions``' words."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fedlab.run.cautions import cautions, noise_ratio
from fedlab.run.directory import RunDirectory
from strategies.server.heads import trained_names
from strategies.server.loop import Rounds


def epilogue(directory: RunDirectory, rounds: Rounds, result: Mapping[str, Any]) -> dict[str, Any]:
    """``noise_ratio`` and ``warnings`` of ``result.json``.

    Args:
        directory: of the run; its ``metrics.jsonl`` says how it went.
        rounds: as they ended.
        result: what else ``result.json`` says.
    """
    lines = [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ratio = _noise_ratio(rounds)
    held_out, choices = _held_out(rounds)
    known = {**result, "noise_ratio": ratio}
    return {"noise_ratio": ratio, "warnings": cautions(rounds.config, known, lines, held_out, choices)}


def _noise_ratio(rounds: Rounds) -> float | None:
    if not rounds.config.private:
        return None
    coordinates = sum(rounds.state[name].numel() for name in trained_names(rounds.strategy, rounds.state))
    if (plan := rounds.accounts.plan) is not None:
        return noise_ratio([(plan.sigma / plan.normaliser, rounds.done)], coordinates)
    federation, privacy = rounds.federation, rounds.config.privacy
    if privacy.survivors is not None:
        return _noise_of_sums(rounds, privacy.survivors - privacy.colluding, coordinates)
    parts = [
        (info.event.sigma / (info.event.q * info.examples), info.event.steps * federation.participations[client])
        for client, info in federation.clients.items()
        if info.event is not None and info.examples
    ]
    return noise_ratio(parts, coordinates)


def _noise_of_sums(rounds: Rounds, honest: int, coordinates: int) -> float | None:
    """Of a run under shared noise: one step per round on the mean over all records of the clients drawn, with the
    shares of all of them, of which ``honest`` alone come to σ.
    """
    known = [info for info in rounds.federation.clients.values() if info.event is not None and info.examples]
    if not known:
        return None
    drawn, event = rounds.config.clients_per_round, known[0].event
    assert event is not None
    expected = event.q * sum(info.examples for info in known) * drawn / len(known)
    return noise_ratio([(event.sigma * math.sqrt(drawn / honest) / expected, rounds.done)], coordinates)


def _held_out(rounds: Rounds) -> tuple[dict[str, int], int]:
    """Label → texts that the model is scored on, and how many labels a text is told apart among; nothing where a text
    has no one label.
    """
    if (found := rounds.data.held_out()) is None:
        return {}, 0
    corpus, test = found
    if not corpus.label_names or corpus.several:
        return {}, 0
    counted = Counter(corpus.labels[test].tolist())
    groups = rounds.session.model.objective.groups
    own = {groups[label] for label in counted} if groups else set()
    choices = min((sum(group == one for group in groups) for one in own), default=len(corpus.label_names))
    return {corpus.label_names[label]: count for label, count in counted.items()}, choices
