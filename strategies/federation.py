"""Who is there: nodes, the clients they host, what each client declared, and who takes part in a round.

In a simulation every node can host every client, so a round's clients are dealt over the nodes; in a deployment a node hosts the
one client it names. Which node trains a client never changes its result.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlab.config import RunConfig
from fedlab.errors import RunFailed
from fedlab.privacy.accounting import Event
from fedlab.seeds import client_order, stream
from strategies.exchange import exchange


@dataclass(frozen=True)
class ClientInfo:
    """What a client declares about itself before the first round. Its size is public: it is its weight."""

    examples: int
    event: Event | None = None  # what one round costs it; None without DP
    delta: float = math.nan


@dataclass
class Federation:
    """The clients of a run and how often each took part."""

    config: RunConfig
    clients: dict[str, ClientInfo]
    hosts: dict[str, int]  # client → the one node that hosts it; empty in a simulation
    nodes: list[int]
    participations: Counter[str] = field(default_factory=Counter)

    @classmethod
    def discover(cls, grid: Grid, config: RunConfig, timeout: float, meanwhile: Callable[[], object] = lambda: None) -> Federation:
        """Ask every node which clients it hosts, and let the clients declare sizes and privacy plans.

        ``meanwhile`` runs between asking and collecting. Raises RunFailed if a node fails or does not answer.
        """
        nodes = sorted(grid.get_node_ids())
        everyone = [f"client-{i}" for i in range(config.data.clients)]
        messages = []
        for position, node in enumerate(nodes):
            record = ConfigRecord({"config": config.to_toml(), "clients": everyone[position :: len(nodes)]})
            messages.append(Message(RecordDict({"round": record}), node, f"{MessageType.QUERY}.describe"))
        clients: dict[str, ClientInfo] = {}
        hosts: dict[str, int] = {}
        answered = 0
        for reply in exchange(grid, messages, timeout, meanwhile=meanwhile):
            if reply.has_error():
                raise RunFailed(f"a node could not prepare the run: {reply.error.reason}")
            answer: Any = reply.content.config_records["clients"]  # per-client lists
            answered += 1
            for i, client in enumerate(answer["ids"]):
                client, q = str(client), answer["q"][i]
                event = Event(answer["sampler"][i], q, answer["sigma"][i], answer["steps"][i]) if config.private else None
                clients[client] = ClientInfo(answer["examples"][i], event, answer["delta"][i])
                if answer["pinned"]:
                    hosts[client] = reply.metadata.src_node_id
        if answered < len(nodes):
            raise RunFailed(f"{len(nodes) - answered} of {len(nodes)} nodes did not answer in {timeout:.0f} s")
        return cls(config, dict(sorted(clients.items(), key=lambda item: client_order(item[0]))), hosts, nodes)

    def draw(self, round_number: int) -> list[str]:
        """Choose and count this round's clients. Nobody is drawn beyond the cap on participations.

        ``balanced`` takes those that took part least, ties at random, so counts differ by at most one; ``uniform`` takes a uniform
        sample of those below the cap. May return fewer than ``clients_per_round``, also none, once caps bind.
        """
        cap = self.config.participations if self.config.private else self.config.run.rounds
        eligible = [client for client in self.clients if self.participations[client] < cap]
        shuffled = [eligible[i] for i in stream(self.config.run.seed, "clients", round_number).permutation(len(eligible))]
        if self.config.run.sampling == "balanced":
            shuffled.sort(key=lambda client: self.participations[client])
        drawn = sorted(shuffled[: self.config.clients_per_round], key=client_order)
        self.participations.update(drawn)
        return drawn

    def cohorts(self, clients: list[str]) -> dict[int, list[str]]:
        """Deal clients to nodes, largest first to the node with the least work, each cohort in client order."""
        load: Counter[int] = Counter()
        cohorts: dict[int, list[str]] = {}
        for client in sorted(clients, key=lambda c: (-self.clients[c].examples, client_order(c))):
            node = self.hosts[client] if client in self.hosts else min(self.nodes, key=lambda n: (load[n], n))
            load[node] += self._work(client)
            cohorts.setdefault(node, []).append(client)
        return {node: sorted(cohort, key=client_order) for node, cohort in cohorts.items()}

    def _work(self, client: str) -> int:
        """Expected examples of one round: with fixed steps all clients cost the same, with epochs the large ones cost more."""
        return 1 if self.config.train.steps is not None else self.clients[client].examples
