"""The messages: what the server asks and what a client answers, one frozen dataclass each.

Everything data-dependent in a reply is a ``Release``; beside releases a reply holds ledger lines, which are signed and
say nothing of the data, keys, times, and codes of failure. The resolved configuration
travels once per run, in ``DescribeRequest``, and is named by its hash in all others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from fedlab.protocol.failures import FailureCode
from fedlab.protocol.fields import (
    MOST_CONFIGURATION,
    ClientId,
    Count,
    Failure,
    Lines,
    Name,
    Names,
    NoDigest,
    Number,
    Part,
    Positive,
    PublicKey,
    RunReference,
    Strict,
    WireType,
)
from fedlab.protocol.sum_messages import (
    ConfirmReply,
    ConfirmRequest,
    PrepareReply,
    PrepareRequest,
    SumKey,
    SumOrder,
    UnmaskReply,
    UnmaskRequest,
)
from fedlab.protocol.wire import Arrays
from fedlab.version import VERSION


@dataclass(frozen=True)
class EventFields(Strict):
    """A DP event as it travels (``fedlab.privacy.accounting.Event``)."""

    sampler: Literal["poisson", "poisson_discrete", "fixed_wor", "shuffle", "full"]
    q: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    sigma: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    steps: Count


@dataclass(frozen=True)
class Release(Strict):
    """Something data-dependent that leaves a client, and what it amounts to.

    ``event`` is the DP event that was charged for it, or None: then it is public, and the statement says so in the
    sentence that ``fedlab.privacy.release`` has under its name.
    """

    name: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z-]{0,39}$")]
    arrays: Arrays = field(default_factory=dict)
    numbers: dict[Name, Number] = field(default_factory=dict)
    event: EventFields | None = None


@dataclass(frozen=True)
class DescribeRequest(Strict):
    """Before the first round: take the configuration, say who is there, and sign the privacy plan."""

    run: RunReference
    configuration: Annotated[str, StringConstraints(max_length=MOST_CONFIGURATION)]
    clients: tuple[ClientId, ...]  # of a simulation; a node with an owner of its own answers for that one
    simulation: str = ""  # run directory of a simulation, whose nodes share the server's disk; "" elsewhere
    basis: Arrays = field(default_factory=dict)
    version: Annotated[str, StringConstraints(max_length=64)] = VERSION  # of fedlab at the server


@dataclass(frozen=True)
class ClientOrder(Strict):
    """What a request says of one client: how many of its ledger's lines the server knows, and the adapter's rank."""

    client: ClientId
    known: Count
    rank: Positive


def _each_once(orders: tuple[ClientOrder, ...]) -> tuple[ClientOrder, ...]:
    """A client that is named twice would be charged twice for one answer."""
    if len({order.client for order in orders}) < len(orders):
        raise ValueError("names a client twice")
    return orders


ClientOrders = Annotated[tuple[ClientOrder, ...], AfterValidator(_each_once)]


@dataclass(frozen=True)
class TrainRequest(Strict):
    """Train these clients for one round, in passes of so many of them."""

    run: RunReference
    round: Positive
    clients: ClientOrders
    passes: tuple[Positive, ...]  # sizes, in the clients' order
    trained: Names  # of tensors, each once
    personal: tuple[Part, ...]  # of them, what clients keep
    wire: WireType
    state: Arrays
    sum: SumOrder | None = None  # under shared noise, where what is sent is masked


@dataclass(frozen=True)
class EvaluateRequest(Strict):
    """Score the state on each client's held-out examples."""

    run: RunReference
    round: Count
    clients: tuple[ClientId, ...]
    personal: tuple[Part, ...]
    wire: WireType
    state: Arrays


@dataclass(frozen=True)
class ReceiptFor(Strict):
    """The server's countersignature of one client's last commit ("" if there is none)."""

    client: ClientId
    known: Count
    receipt: Annotated[str, StringConstraints(max_length=2**16)]


@dataclass(frozen=True)
class ReceiptsRequest(Strict):
    """Keep receipts, and send whatever ledger lines the server does not know yet."""

    run: RunReference
    clients: tuple[ReceiptFor, ...]
    closing: bool = False  # the run is over: say so in the ledger


@dataclass(frozen=True)
class GramRequest(Strict):
    """At a task's end: release which inputs it used."""

    run: RunReference
    clients: ClientOrders
    sum: SumOrder | None  # None where nothing is masked
    state: Arrays  # float32


@dataclass(frozen=True)
class ClientReply(Strict):
    """One client's answer."""

    client: ClientId
    releases: tuple[Release, ...] = ()
    lines: Lines | None = None  # of its ledger that the server did not know; None where it could not be read
    failure: Failure | None = None
    exhausted: bool = False  # its budget cannot cover another round

    def release(self, name: str) -> Release | None:
        """The release of this name, if there is one."""
        return next((release for release in self.releases if release.name == name), None)


@dataclass(frozen=True)
class Enrolment(Strict):
    """What one client declares before the first round: its size, and under DP its key, δ, and what a round costs it."""

    reply: ClientReply  # releases its size; its whole ledger
    key: PublicKey | NoDigest = ""
    delta: Number | None = None
    event: EventFields | None = None
    sum_key: SumKey | None = None  # where the run has secure sums


@dataclass(frozen=True)
class DescribeReply(Strict):
    """Who is there. ``exclusive``: these clients are on this node and on no other."""

    clients: tuple[Enrolment, ...]
    exclusive: bool = False


@dataclass(frozen=True)
class NodeFailure(Strict):
    """Instead of a reply: what concerns no single client of the node."""

    code: FailureCode


@dataclass(frozen=True)
class Timed(Strict):
    """Base of replies that say when their work began and ended, in seconds since the epoch."""

    started: Number
    ended: Number


@dataclass(frozen=True)
class TrainReply(Timed):
    """Each client's update; or, under shared noise, the sum of the shares of those of the clients that did not fail."""

    clients: tuple[ClientReply, ...]
    sum: Release | None = None


@dataclass(frozen=True)
class EvaluateReply(Timed):
    """Each client's scores."""

    clients: tuple[ClientReply, ...]


@dataclass(frozen=True)
class ReceiptsReply(Strict):
    """Each client's new ledger lines."""

    clients: tuple[ClientReply, ...]


@dataclass(frozen=True)
class GramReply(Timed):
    """The sum over those of the clients that did not fail, and each client's ledger lines."""

    clients: tuple[ClientReply, ...]
    sum: Release | None


Request = (
    DescribeRequest
    | TrainRequest
    | EvaluateRequest
    | ReceiptsRequest
    | PrepareRequest
    | ConfirmRequest
    | UnmaskRequest
    | GramRequest
)
NODE_FAILURE = "failure"  # kind of a ``NodeFailure``, which may come instead of any reply
REQUESTS: dict[str, type[Strict]] = {
    "describe": DescribeRequest,
    "train": TrainRequest,
    "evaluate": EvaluateRequest,
    "receipts": ReceiptsRequest,
    "prepare": PrepareRequest,
    "confirm": ConfirmRequest,
    "unmask": UnmaskRequest,
    "gram": GramRequest,
}
REPLIES: dict[str, type[Strict]] = {
    "describe": DescribeReply,
    "train": TrainReply,
    "evaluate": EvaluateReply,
    "receipts": ReceiptsReply,
    "prepare": PrepareReply,
    "confirm": ConfirmReply,
    "unmask": UnmaskReply,
    "gram": GramReply,
}
