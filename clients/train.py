"""One request of training: its clients in passes that several share, on the process's one model.

Under DP every charge is signed and on the disk before the client's data is touched, and the update is committed before
it leaves. A client that fails is named with a code, its own log says why, and the others go on.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from clients.account import ClientAccount, digest_of
from clients.node import Node
from clients.owner import Owner
from clients.pending import Asked, PendingRelease, Releases, failure_of
from clients.secure_sum import hide
from fedlab.errors import FedlabError, PrivacyError
from fedlab.lora.ranks import widen
from fedlab.lora.state import BASIS, PAST, State, digest, from_wire, part_of, select, to_wire
from fedlab.privacy.release import METRICS, TIMING, UPDATE, public, public_names
from fedlab.privacy.secure_sum.masking import add
from fedlab.protocol import ProtocolError
from fedlab.protocol.messages import ClientOrder, ClientReply, Release, TrainReply, TrainRequest
from fedlab.session import Session
from fedlab.train.check_gradients import require_per_example
from fedlab.train.cohort import supports_fused, train_cohort
from fedlab.train.dp import PerExampleGradients
from fedlab.train.local import LocalTraining, Summed, Trained
from fedlab.train.opacus import OpacusGradients
from fedlab.train.sums import noised_share, sum_client, sum_clients
from fedlab.train.trainer import train_client

logger = logging.getLogger("fedlab")


@dataclass(frozen=True)
class _Round:
    """What all clients of one request have in common."""

    node: Node
    request: TrainRequest
    state: State  # as received, and what stays as it is during the task
    received: str  # digest of what was received; "" without DP

    @property
    def session(self) -> Session:
        return self.node.session

    @property
    def shared(self) -> bool:
        """Whether what leaves is a share of a sum over clients, and not an update."""
        return self.node.config.shared_noise


@dataclass
class _Client:
    """One client of a request. Its charge is open from before its data is touched until its update is committed."""

    order: ClientOrder
    owner: Owner
    pending: PendingRelease
    account: ClientAccount | None = None
    training: LocalTraining | None = None
    trained: Trained | Summed | None = None
    releases: Releases = ()

    @property
    def name(self) -> str:
        return self.order.client

    def fail(self, error: BaseException) -> None:
        """Nothing of it is released; why, its own log says."""
        self.pending.fail(error)
        self.training, self.trained, self.releases = None, None, ()
        self.owner.note(error, "no update")


def answer_train(node: Node, request: TrainRequest) -> TrainReply:
    """Every client's update, or why there is none."""
    started = time.time()
    _check_sum(node, request)
    received = from_wire(request.state, request.wire)
    current = _Round(node, request, received | node.session.basis, digest(received) if node.config.private else "")
    replies, total = [], None
    for orders in _passes(request):
        clients = [_client(node, order) for order in orders]
        _train_pass(current, clients)
        for client in clients:
            reply = _reply(current, client)
            if current.shared and reply.failure is None:
                reply, total = _added(reply, total)
            replies.append(reply)
    return TrainReply(started, time.time(), tuple(replies), total)


def _check_sum(node: Node, request: TrainRequest) -> None:
    """Raise ProtocolError unless shares are asked for as they may leave: masked, but for a simulation that leaves that
    out.
    """
    config = node.config
    if request.sum is not None and not config.shared_noise:
        raise ProtocolError("sum", "this configuration has no shared noise, so nothing is masked")
    if config.shared_noise and request.sum is None and (config.privacy.masked or node.owners.exclusive):
        raise ProtocolError("sum", "is missing: a share leaves its client masked, or not at all")


def _added(reply: ClientReply, total: Release | None) -> tuple[ClientReply, Release]:
    """A client's reply without its share, and the node's sum with it."""
    share = reply.release(UPDATE)
    assert share is not None
    arrays = add(total.arrays if total is not None else {}, share.arrays)
    rest = tuple(release for release in reply.releases if release is not share)
    return replace(reply, releases=rest), replace(share, arrays=arrays)


def _client(node: Node, order: ClientOrder) -> _Client:
    """A client of the request. Raises ProtocolError if it is not on this node."""
    owner = node.owners.one(order.client)
    return _Client(order, owner, PendingRelease(UPDATE, owner.guarded))


def _passes(request: TrainRequest) -> Iterator[Sequence[ClientOrder]]:
    """The clients of each pass. Raises ProtocolError where they do not add up."""
    if sum(request.passes) != len(request.clients):
        raise ProtocolError(
            "passes", f"{list(request.passes)} do not add up to the {len(request.clients)} clients of this message"
        )
    start = 0
    for size in request.passes:
        yield request.clients[start : start + size]
        start += size


def _train_pass(current: _Round, clients: list[_Client]) -> None:
    """Charge every client of a pass, train them together, commit each.

    What fails for one is its own failure; else it is everybody's.
    """
    try:
        for client in clients:
            try:
                _begin(current, client)
            except Exception as error:
                client.fail(error)
        ready = [client for client in clients if client.training is not None]
        results = _results(current, [client.training for client in ready if client.training])
        for client in ready:
            try:
                if isinstance(found := results[client.name], Exception):
                    raise found
                _end(current, client, found)
            except Exception as error:
                client.fail(error)
    except BaseException as error:
        for client in clients:
            if not client.releases and client.pending.failure is None:
                client.fail(error)
        if not isinstance(error, Exception):  # Ctrl-C
            raise


def _begin(current: _Round, client: _Client) -> None:
    """Everything before the client's data is touched: its start and its scope, and last its charge."""
    session, request, rank = current.session, current.request, client.order.rank
    highest = max(len(value) for name, value in current.state.items() if name.endswith(".lora_A"))
    if rank > highest:
        raise ProtocolError("rank", f"{rank} was asked for, outside [1, {highest}]", client.name)
    start = current.state | (client.owner.load_personal(request.round) if request.personal else {})
    if client.pending.guarded:
        client.account = ClientAccount(session, client.owner, request.run)
        client.account.check_scope(request.trained)
        require_per_example(session.model, session.config, request.trained)
        if (again := client.pending.charge(client.account, _asked(current, client, client.account))) is not None:
            client.releases = again
            return
    plan_or_none = client.account.plan if client.account else None
    client.training = LocalTraining(client.name, start, plan_or_none, rank if rank < highest else None)


def _asked(current: _Round, client: _Client, account: ClientAccount) -> Asked:
    """What a round is charged under; the state, and everything else in the request that decides the update."""
    request = current.request
    decides = (request.run.basis, sorted(request.trained), sorted(request.personal), request.wire, client.order.rank)
    masks = (asdict(request.sum),) if request.sum is not None else ()
    asked = digest_of(request.run.configuration, current.received, *decides, *masks)
    return Asked(account.guard, account.terms, account.plan.event(), request.round, current.received, asked)


def _results(current: _Round, trainings: list[LocalTraining]) -> Mapping[str, Trained | Summed | Exception]:
    """The clients' results; a group that does not fit into a GPU's memory is halved."""
    session, request = current.session, current.request
    if not trainings:
        return {}
    if session.config.train.gradients != "fused" or not supports_fused(session.model, request.trained):
        return _one_by_one(current, trainings)
    together = sum_clients if current.shared else train_cohort
    try:
        return together(session.model, session.data, trainings, list(request.trained), session.config, request.round)
    except torch.cuda.OutOfMemoryError:
        if len(trainings) == 1:
            raise
        logger.warning(
            "%d clients in one pass do not fit into the GPU's memory; going on with half as many", len(trainings)
        )
    torch.cuda.empty_cache()
    half = len(trainings) // 2
    return {**_results(current, trainings[:half]), **_results(current, trainings[half:])}


def _one_by_one(current: _Round, trainings: list[LocalTraining]) -> Mapping[str, Trained | Summed | Exception]:
    """The clients' results without fused layers; what fails for one is its own failure."""
    session, request = current.session, current.request
    if any(part_of(name) in (BASIS, PAST) for name in trainings[0].state):
        raise FedlabError(
            f'strategy.name = "{session.config.strategy.name}" needs a linear head and train.gradients = "fused"'
        )
    results: dict[str, Trained | Summed | Exception] = {}
    hooks = OpacusGradients if session.config.train.gradients == "opacus" else PerExampleGradients
    model, data, config, names = session.model, session.data, session.config, request.trained
    for t in trainings:
        try:
            if current.shared:
                results[t.client] = sum_client(model, data, t, names, config, request.round, hooks)
                continue
            results[t.client] = train_client(
                model, data, t.client, t.state, names, config, request.round, t.plan, t.rank, hooks
            )
        except Exception as error:
            results[t.client] = error
    return results


def _end(current: _Round, client: _Client, result: Trained | Summed) -> None:
    """What the client keeps goes to its disk, what it sends is committed."""
    request = current.request
    if isinstance(result, Summed):
        share = _share(current, client, result)
        content = {name: torch.from_numpy(value) for name, value in share.items()}
        client.releases = client.pending.commit(result.steps, share, content, _beside(current, result))
        client.trained = result
        return
    assert client.training is not None
    start = client.training.state
    own = select(result.update, list(request.personal))
    if own:
        kept = {name: start[name] + value for name, value in widen(own, start).items()}
        client.owner.save_personal(request.round, kept)
    wire = to_wire({name: value for name, value in result.update.items() if name not in own}, request.wire)
    content = from_wire(wire, request.wire) if client.pending.guarded else {}
    client.releases = client.pending.commit(result.steps, wire, content, _beside(current, result))
    client.trained = result


def _share(current: _Round, client: _Client, result: Summed) -> dict[str, np.ndarray]:
    """The client's clipped sum with its share of the noise, masked where that is asked for: what may leave it."""
    account, request = client.account, current.request
    assert account is not None
    config, number = current.session.config, request.round
    share = noised_share(result, account.plan, account.dimension, config, client.name, number)
    if request.sum is None:
        return share
    return hide(client.owner, share, request.run.run, ("round", number), request.sum)


def _reply(current: _Round, client: _Client) -> ClientReply:
    """What leaves the client: its update, the ledger's new lines, and whether another round is within the budget."""
    reply = ClientReply(client.name, client.releases, failure=client.pending.failure)
    if client.account is None:
        return reply
    try:
        exhausted = bool(client.releases) and client.account.exhausted(current.request.round + 1)
        return replace(reply, lines=client.account.lines_after(client.order.known), exhausted=exhausted)
    except PrivacyError as error:
        client.owner.note(error, "its ledger")
        return replace(reply, failure=reply.failure or failure_of(error))


def _beside(current: _Round, found: Trained | Summed) -> Releases:
    """Beside the update: what the statement says is not protected."""
    config = current.session.config
    timing = public(TIMING, {"steps": found.steps, "seconds": found.seconds})
    if METRICS not in public_names(config):
        return (timing,)
    values = {"loss": found.loss, "clip_fraction": found.clip_fraction}
    return (timing, public(METRICS, {name: value for name, value in values.items() if not math.isnan(value)}))
