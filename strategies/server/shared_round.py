"""A round under shared noise: the server sees one sum of all clients' shares, and nothing of one client.

Every client's clipped sum came with its share of the noise, in integers on a grid (``fedlab.privacy.noise_share``).
Their sum modulo 2^64, decoded and divided by the expected number of examples of those in it, is the noised gradient of
one step of DP-SGD on their pooled examples; what the server's optimiser makes of it is post-processing. Where fewer
clients than ``privacy.survivors`` are in the sum, its noise would be less than was promised: nothing is released, and
the charges stand.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from flwr.serverapp import Grid

from fedlab.config import RunConfig
from fedlab.errors import PrivacyError, RunFailed
from fedlab.lora.state import State, digest
from fedlab.privacy.noise_share import NoiseShare
from fedlab.privacy.release import METRICS, TIMING, UPDATE
from fedlab.privacy.secure_sum.settings import Purpose
from fedlab.protocol import ProtocolError
from fedlab.protocol.checks import check_arrays, wire_bytes
from fedlab.protocol.messages import ClientReply, Release, TrainReply
from fedlab.train.optimizer import learning_rate_factor, rates
from strategies.base import Strategy
from strategies.server.exchange import Answers
from strategies.server.federation import Federation
from strategies.server.heads import sent_names
from strategies.server.messages import Messenger, TrainingOrder
from strategies.server.outcome import UNUSABLE, TrainOutcome
from strategies.server.secure_sum import SecureSum

logger = logging.getLogger("fedlab")
MOST_UNRELEASED = 3  # rounds in a row that release nothing, after which the run fails


class SumMessenger(Messenger):
    """Asks for shares of a sum in place of updates; a node that plays several clients adds theirs up.

    What comes is masked (``strategies.server.secure_sum``), unless a simulation leaves that out.
    """

    def __init__(self, grid: Grid, config: RunConfig, federation: Federation, strategy: Strategy) -> None:
        super().__init__(grid, config, federation, strategy)
        self.sums: SecureSum | None = None
        if config.privacy.masked or federation.hosts:
            self.sums = SecureSum(grid, config, federation)
        self._unready: dict[str, str] = {}  # client → why it is not asked in this round

    def prepared(self, number: int, drawn: list[str]) -> list[str]:
        """Those of the clients drawn whose masks are ready; nobody where a cut-off run asked for this round before,
        whose masks nobody can take off any more.
        """
        if self.sums is None:
            return drawn
        if asked := self._asked_before(number):
            logger.warning("round %d was cut off when %s had sent masked values: it is lost", number, asked[0])
            self._unready = dict.fromkeys(drawn, "the round was cut off, and its masks are gone")
            if self.config.privacy.noise == "secure":  # what it was charged is counted already
                self.federation.participations.subtract(drawn)
                if self.federation.hosts:  # but for what a client on a machine of its own could give again
                    self.federation.participations.update(self._asked_before(number, committed=True))
            return []
        ready = self.sums.prepare("round", number, drawn)
        self._unready = dict.fromkeys(sorted(set(drawn) - set(ready)), "it prepared no masks")
        self.federation.participations.subtract(self._unready.keys())
        return ready

    def _asked_before(self, number: int, committed: bool = False) -> list[str]:
        """Clients that were charged for a round that is yet to be; or, of them, those that committed to it."""
        mirror = self.federation.mirror
        assert mirror is not None
        run, found = self.federation.run.run, dict[str, set[str]]()
        for client in self.federation.clients:
            lines = mirror.entries(client)
            charges = {e["hash"] for e in lines if (e["type"], e["run"], e.get("round")) == ("CHARGE", run, number)}
            commits = {e["charge"] for e in lines if e["type"] == "COMMIT"}
            found[client] = charges & commits if committed else charges
        return [client for client, lines in found.items() if lines]

    def finish(self, number: int, outcome: TrainOutcome) -> None:
        """Take the masks off the sum, and let the clients prepare the next round in the same exchange."""
        if self.sums is None or not outcome.members:
            return
        following: tuple[Purpose, int, list[str]] | None = None
        if number < self.config.run.rounds:
            following = "round", number + 1, self.federation.chosen(number + 1)
        total = self.sums.unmask(outcome.total, outcome.members, following)
        outcome.total = total or {}
        outcome.lost = "" if total is not None else "too few of them revealed what takes the masks off"

    def order_training(
        self, number: int, state: State, ranks: Mapping[str, int], drawn: Sequence[str]
    ) -> TrainingOrder:
        """See ``Messenger.order_training``. Noise is everybody's: a share has the state's shapes, whatever the client's
        rank.
        """
        order = super().order_training(number, state, ranks, drawn)
        if (sums := self.sums) is not None:
            masks = {node: sums.order([c.client for c in asked.clients]) for node, asked in order.requests.items()}
            order = replace(order, requests={n: replace(asked, sum=masks[n]) for n, asked in order.requests.items()})
        shapes = {name: tuple(state[name].shape) for name in sent_names(self.strategy, state, number)}
        return replace(order, shapes=dict.fromkeys(drawn, shapes))

    def _most(self, order: TrainingOrder, cohort: Sequence[str]) -> int:
        return wire_bytes(order.shapes[cohort[0]], "int64")

    def _take_all(
        self,
        order: TrainingOrder,
        cohorts: Mapping[int, Sequence[str]],
        answers: Answers[TrainReply],
        outcome: TrainOutcome,
    ) -> None:
        """Enter every node's sum."""
        outcome.excluded |= self._unready
        heard = self._by_client(cohorts, answers, outcome.excluded)
        inside = {client for client, reply in heard.items() if self.hear(client, reply, outcome)}
        for node, reply in answers.replies.items():
            said = [mine.client for mine in reply.clients if mine.failure is None and mine.client in cohorts[node]]
            try:
                self._take_sum(order, said, inside, heard, reply.sum, outcome)
            except ProtocolError as error:
                self._leave_out(said, f"{error.field}: {error.problem}", outcome)
            except PrivacyError as error:
                outcome.unproven.update(said)
                self._leave_out(said, str(error), outcome)

    def _take_sum(
        self,
        order: TrainingOrder,
        said: Sequence[str],
        inside: set[str],
        heard: Mapping[str, ClientReply],
        share: Release | None,
        outcome: TrainOutcome,
    ) -> None:
        """Enter one node's sum of the shares of the clients ``said``.

        Raises:
            ProtocolError: it is not what was asked for, or one of its terms cannot be used, of which it cannot be rid.
            PrivacyError: a ledger does not show that it was charged and committed.
        """
        if not said:
            return
        if share is None:
            raise ProtocolError(UPDATE, "is missing")
        if share.name != UPDATE:
            raise ProtocolError(share.name, "was not asked for")
        check_arrays(share, order.shapes[said[0]], "int64", "")
        alone = None
        if len(said) == 1:
            alone = digest({name: torch.from_numpy(value.copy()) for name, value in share.arrays.items()})
        commits = {}
        for client in said:
            if client not in inside:
                raise ProtocolError(client, "is in the node's sum, and cannot be used")
            _check_beside(client, heard[client])
            self.check_event(client, share)
            if self.federation.mirror is not None:
                commits[client] = self.witness(order, client, alone)
        outcome.add_share(share.arrays, said)
        outcome.commits |= commits
        outcome.metrics |= {client: self.metrics(client, heard[client]) for client in said}
        outcome.bytes_up += len(said) * sum(value.nbytes for value in share.arrays.values())

    def _leave_out(self, said: Sequence[str], reason: str, outcome: TrainOutcome) -> None:
        for client in said:
            outcome.excluded.setdefault(client, f"{UNUSABLE}: {reason}")


def _check_beside(client: str, reply: ClientReply) -> None:
    """Raise ProtocolError where something came beside a share that nobody asked for."""
    for release in reply.releases:
        if release.name not in (TIMING, METRICS) or release.arrays:
            raise ProtocolError(release.name, "was not asked for", client)


@dataclass
class Unreleased:
    """Rounds that released nothing, because too few clients' shares came.

    Args:
        least: clients whose shares a sum needs.
        rounds: in all.
        in_a_row: up to now.
    """

    least: int
    rounds: int = 0
    in_a_row: int = 0

    def judge(self, number: int, outcome: TrainOutcome) -> bool:
        """Whether a round releases something. Raises RunFailed where several in a row did not."""
        if len(outcome.members) >= self.least and not outcome.lost:
            self.in_a_row = 0
            return True
        self.rounds, self.in_a_row = self.rounds + 1, self.in_a_row + 1
        reasons = "; ".join(f"{client}: {reason}" for client, reason in list(outcome.excluded.items())[:3])
        why = outcome.lost or reasons or "nobody answered"
        told = (
            f"round {number} released nothing: {len(outcome.members)} clients' shares came, privacy.survivors ="
            f" {self.least} are needed ({why}); what it cost is spent"
        )
        if self.in_a_row >= MOST_UNRELEASED:
            raise RunFailed(f"{told}. So it was in {self.in_a_row} rounds one after another")
        logger.warning("%s", told, extra={"round": number})
        return False


def shared_change(config: RunConfig, federation: Federation, outcome: TrainOutcome, number: int) -> State:
    """The server's step before its optimiser: −lr times the decoded sum over the expected number of examples.

    Args:
        config: of the run.
        federation: knows the sizes that clients declared.
        outcome: with a sum of at least ``privacy.survivors`` shares.
        number: of the round; decides how much of the learning rate is left.
    """
    privacy, train = config.privacy, config.train
    assert privacy.survivors is not None
    assert privacy.clip is not None
    assert train.sampling_rate is not None
    share = NoiseShare(privacy.survivors, privacy.colluding)
    expected = train.sampling_rate * sum(federation.clients[client].examples for client in outcome.members)
    factor = learning_rate_factor(train, number, config.run.rounds) / expected
    change = {}
    for lr, names in rates(train, outcome.total, factor):
        for name in names:
            change[name] = (-lr * torch.from_numpy(share.decode(outcome.total[name], privacy.clip))).float()
    return change
