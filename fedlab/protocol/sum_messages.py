"""Messages of secure sums (``fedlab.privacy.secure_sum``): keys, preparation, confirmation, unmasking."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedlab.protocol.fields import (
    ClientId,
    Count,
    Digest,
    Failure,
    NoDigest,
    Positive,
    PublicKey,
    RunReference,
    Sealed,
    Share,
    Signature,
    Strict,
    SumName,
)


@dataclass(frozen=True)
class SumKey(Strict):
    """A client's key of a run's secure sums, to which shares for it are sealed (``fedlab.privacy.secure_sum``)."""

    identity: PublicKey  # Ed25519, that signs its ledger
    public: PublicKey  # X25519, fresh in every run
    signature: Signature


@dataclass(frozen=True)
class SumSetting(Strict):
    """A secure sum, as all who take part in it must see it alike."""

    name: SumName
    survivors: Positive  # fewest clients whose values may be added up
    colluding: Count  # clients that may put what they know together with the server
    participants: dict[ClientId, PublicKey]  # client → identity


@dataclass(frozen=True)
class SumPlan(Strict):
    """A secure sum that is to be prepared, and the keys of whoever is asked and of their neighbours in it."""

    setting: SumSetting
    keys: dict[ClientId, SumKey]


@dataclass(frozen=True)
class MaskKey(Strict):
    """A client's key of one sum, from which masks are derived, and what its self-mask seed hashes to."""

    public: PublicKey
    commitment: Digest
    signature: Signature  # of the setting too


@dataclass(frozen=True)
class SumOrder(Strict):
    """What goes with a request whose answer is masked: the keys of the clients in it and of their neighbours."""

    name: SumName
    keys: dict[ClientId, MaskKey]


@dataclass(frozen=True)
class PrepareRequest(Strict):
    """Make fresh keys for a secure sum, and shares of them."""

    run: RunReference
    clients: tuple[ClientId, ...]
    sum: SumPlan


@dataclass(frozen=True)
class ConfirmRequest(Strict):
    """Sign once whose values have not come; all other participants' have."""

    run: RunReference
    clients: tuple[ClientId, ...]
    name: SumName
    dropped: tuple[ClientId, ...]


@dataclass(frozen=True)
class UnmaskOrder(Strict):
    """The shares that a client's neighbours sealed for it."""

    client: ClientId
    sealed: dict[ClientId, Sealed]  # from whom


@dataclass(frozen=True)
class UnmaskRequest(Strict):
    """Reveal one share of every neighbour: of its self-mask seed, or of its mask key if it dropped out."""

    run: RunReference
    name: SumName
    clients: tuple[UnmaskOrder, ...]
    dropped: tuple[ClientId, ...]
    confirmed: dict[ClientId, Signature]  # by whom; empty where nobody dropped out
    following: SumPlan | None = None  # the next sum, to be prepared by those of the clients that take part in it


@dataclass(frozen=True)
class Preparation(Strict):
    """One client's fresh key of a sum, and shares sealed for its neighbours; or why there is none."""

    client: ClientId
    key: MaskKey | None = None
    sealed: dict[ClientId, Sealed] = field(default_factory=dict)  # for whom
    failure: Failure | None = None


@dataclass(frozen=True)
class PrepareReply(Strict):
    """Each client's preparation."""

    clients: tuple[Preparation, ...]


@dataclass(frozen=True)
class Confirmation(Strict):
    """One client's signature of who dropped out; or why there is none."""

    client: ClientId
    signature: Signature | NoDigest = ""
    failure: Failure | None = None


@dataclass(frozen=True)
class ConfirmReply(Strict):
    """Each client's signature."""

    clients: tuple[Confirmation, ...]


@dataclass(frozen=True)
class Revealed(Strict):
    """One client's shares, one of each neighbour and of itself; or why there are none."""

    client: ClientId
    shares: dict[ClientId, Share] = field(default_factory=dict)  # whose
    failure: Failure | None = None


@dataclass(frozen=True)
class UnmaskReply(Strict):
    """Each client's shares, and its preparation of the next sum if it was asked for one."""

    clients: tuple[Revealed, ...]
    prepared: tuple[Preparation, ...] = ()
