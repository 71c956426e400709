"""Who is there: nodes, the clients they host, what each client declared, and who takes part in a round.

In a simulation every node can host every client, so a round's clients are assigned to the nodes; in a deployment a node
hosts the one client it names. Which node trains a client never changes its result.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from fedlab.config import RunConfig
from fedlab.errors import FedlabError
from fedlab.privacy.accounting import Event
from fedlab.privacy.ledger.mirror import LedgerMirror
from fedlab.privacy.noise import SecureStream
from fedlab.protocol.fields import RunReference
from fedlab.protocol.messages import ClientReply
from fedlab.protocol.sum_messages import SumKey
from fedlab.seeds import client_order, random_stream

NOWHERE = 0  # host of a client that took part before its run was resumed, and is not back yet
SPENT = ("budget-exhausted", "participations")  # codes of a client that did all it could


@dataclass(frozen=True)
class ClientInfo:
    """What a client declares about itself before the first round. Its size is public: it is its weight."""

    examples: int
    event: Event | None = None  # what one round costs it; None if it adds no noise itself
    delta: float = math.nan


@dataclass
class Federation:
    """The clients of a run and how often each took part."""

    config: RunConfig
    clients: dict[str, ClientInfo]
    hosts: dict[str, int]  # client → the one node that hosts it; empty in a simulation
    nodes: list[int]
    run: RunReference = field(default_factory=lambda: RunReference("", "", ()))  # what every request names
    mirror: LedgerMirror | None = None  # what is known of the clients' ledgers; None if they keep none
    refused: dict[str, str] = field(default_factory=dict)  # client → why it takes part no more
    offline: set[str] = field(default_factory=set)  # clients whose node is not there now
    recalled: list[str] = field(default_factory=list)  # clients of before that were not here when the run went on
    sum_keys: dict[str, SumKey] = field(default_factory=dict)  # of clients that mask what is added up
    participations: Counter[str] = field(default_factory=Counter)
    max_clients_per_pass: int = 0  # clients of a pass that fit into memory; 0: as many as the configuration says

    def take_lines(self, reply: ClientReply, problems: dict[str, str]) -> bool:
        """Enter the new lines of a client's ledger; whether they were. A broken chain is a problem of its client."""
        if self.mirror is None or reply.lines is None:
            return False
        try:
            self.mirror.accept(reply.client, reply.lines)
        except FedlabError as error:
            problems[reply.client] = str(error)
            return False
        return True

    def known(self, client: str) -> int:
        """Lines of a client's ledger that it need not send again."""
        return self.mirror.known(client) if self.mirror else 0

    def reachable(self, clients: Iterable[str]) -> list[str]:
        """Those of the clients that a message can be sent to."""
        return [client for client in clients if self.hosts.get(client) != NOWHERE]

    @property
    def unfit(self) -> dict[str, str]:
        """Clients that take part no more for another reason than that they have spent what they may; and the reason."""
        return {client: reason for client, reason in self.refused.items() if not reason.startswith(SPENT)}

    @property
    def eligible(self) -> list[str]:
        """Clients that may be drawn: they did not refuse, and are below the cap on participations."""
        cap = self.config.participations if self.config.privacy.unit == "example" else self.config.run.rounds
        return [client for client in self.clients if client not in self.refused and self.participations[client] < cap]

    @property
    def there(self) -> list[str]:
        """Clients that can be asked now: their node is there, and they signed what the run asks for."""
        return [client for client in self.clients if client not in self.offline and client not in self.refused]

    def draw(self, round_number: int) -> list[str]:
        """Choose and count this round's clients. Nobody is drawn who may not be (``eligible``).

        ``balanced`` takes those that took part least, ties at random, so counts differ by at most one; ``uniform``
        takes a uniform sample; ``poisson`` takes each with probability ``run.fraction``, unforeseeably if the noise is
        secure. May return fewer than
        ``clients_per_round``, also none.
        """
        drawn = self.chosen(round_number)
        self.participations.update(drawn)
        return drawn

    def chosen(self, round_number: int) -> list[str]:
        """Who would be drawn for a round, as things are now."""
        eligible = [client for client in self.eligible if client not in self.offline]
        rng = random_stream(self.config.sampling_seed, "clients", round_number)
        if self.config.run.sampling == "poisson":
            coins = SecureStream() if self.config.privacy.noise == "secure" else rng
            drawn = [
                client
                for client, coin in zip(eligible, coins.random(len(eligible)), strict=True)
                if coin < self.config.run.fraction
            ]
        else:
            shuffled = [eligible[i] for i in rng.permutation(len(eligible))]
            if self.config.run.sampling == "balanced":
                shuffled.sort(key=lambda client: self.participations[client])
            drawn = sorted(shuffled[: self.config.clients_per_round], key=client_order)
        return drawn

    def groups(self, clients: list[str]) -> list[list[str]]:
        """The clients that share a pass: at most ``cohort_size`` of them, alike in work, whatever the number of nodes.

        Sorted by work before they are split evenly, so that in epochs clients of like length train together; a node
        that hosts one client shares its pass with nobody.
        """
        ordered = sorted(clients, key=lambda c: (-self._work(c), client_order(c)))
        size = 1 if self.hosts else min(self.config.cohort_size, self.max_clients_per_pass or self.config.cohort_size)
        count = -(-len(ordered) // size)
        if self.config.run.cohort is None and not self.hosts:
            count = min(len(ordered), _even(count))
        bounds = [round(i * len(ordered) / count) for i in range(count + 1)] if count else [0]
        return [sorted(ordered[a:b], key=client_order) for a, b in pairwise(bounds)]

    def assign(self, groups: list[list[str]]) -> dict[int, list[list[str]]]:
        """Deal groups to nodes, most work first to the node with the least."""
        load: Counter[int] = Counter()
        assigned: dict[int, list[list[str]]] = {}
        for group in sorted(groups, key=lambda g: (-sum(map(self._work, g)), client_order(g[0]))):
            node = self.hosts[group[0]] if group[0] in self.hosts else min(self.nodes, key=lambda n: (load[n], n))
            load[node] += sum(map(self._work, group))
            assigned.setdefault(node, []).append(group)
        return assigned

    def cohorts(self, clients: list[str]) -> dict[int, list[str]]:
        """Deal clients one by one to nodes, each cohort in client order."""
        assigned = self.assign([[client] for client in clients])
        return {
            node: sorted((c for group in groups for c in group), key=client_order) for node, groups in assigned.items()
        }

    def _work(self, client: str) -> int:
        """Expected examples of one round: with fixed steps all clients cost the same, with epochs the large ones cost
        more.
        """
        return 1 if self.config.train.steps is not None else self.clients[client].examples


def _even(groups: int) -> int:
    """As many groups or a few more, in a number that the usual numbers of nodes divide: powers of two, at least 2, then
    multiples of 16.
    """
    return max(2, 1 << (groups - 1).bit_length()) if groups <= 16 else -(-groups // 16) * 16
