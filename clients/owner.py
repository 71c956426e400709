"""One data owner as its machine knows it: who it is, where it keeps what is its own, what it allows and may spend.

A client on a machine of its own has the owner that its own file names (``fedlab.config.client``); a simulation's nodes
have the owners that the run's partition makes. Which of the two it is depends on what was started there, the resident
trainer (``clients.serve``) or a node of a simulation (``clients.app``), never on a message.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clients.log import note
from clients.policy import OwnPolicy, Policy, SimulationPolicy
from fedlab.config import RunConfig
from fedlab.config.client import ClientFile
from fedlab.config.sections import Budget
from fedlab.data.sources import identity
from fedlab.errors import PrivacyError, RunFailed
from fedlab.files import below
from fedlab.lora.state import State
from fedlab.privacy.ledger.guard import Guard, Refusal
from fedlab.privacy.ledger.keys import keyed_hash, load_or_create_key, public_hex
from fedlab.privacy.ledger.ledger import Ledger, lines_after
from fedlab.privacy.release import SCORES, public_names
from fedlab.privacy.secure_sum.settings import purposes
from fedlab.protocol import ProtocolError
from fedlab.protocol.messages import DescribeRequest, EvaluateRequest, GramRequest, ReceiptsRequest, Request
from fedlab.protocol.sum_messages import ConfirmRequest, PrepareRequest, UnmaskRequest
from fedlab.run.personal import load_personal, save_personal
from fedlab.run.places import LOG, Places, simulated_places
from fedlab.session import Session, open_session


@dataclass(frozen=True)
class Owner:
    """One client and what is its own.

    Args:
        client: its id.
        places: where it keeps what is its own.
        policy: what it allows.
        source: where its records are from (``fedlab.data.sources.identity``); its ledger is about them.
        budget: what it may spend over all runs.
        roster: client → identity, as its owner entered them: whom it takes part in secure sums with. None: it takes the
            server's word, in a simulation, and without DP where its owner entered nobody.
    """

    client: str
    places: Places
    policy: Policy
    source: str = ""
    budget: Budget | None = None
    roster: Mapping[str, str] | None = None

    @property
    def identity(self) -> Ed25519PrivateKey:
        """What it signs with: its ledger's key, or where a simulation keeps no ledgers one beside its other keys."""
        owned = self.guarded or self.policy.one_answer
        return load_or_create_key(
            below(self.places.ledgers if owned else self.places.store, "keys", f"{self.client}.pem")
        )

    @property
    def guarded(self) -> bool:
        """Whether everything that depends on its data is charged to its ledger: under example-level DP."""
        return self.policy.unit == "example"

    def guard(self, run: str) -> Guard:
        """Its ledger in a run. Raises PrivacyError for one that cannot be read."""
        return Guard(_ledger(self.places.ledgers, self.client, self.source, run), run, self.policy.one_answer)

    def admit(self, request: Request, config: RunConfig | None) -> None:
        """The gate that every request passes before anything of this owner's is opened.

        Args:
            request: as it came.
            config: the configuration that the request names by its hash; None if it never came here.

        Raises:
            Refusal: for what was not signed, what the policy does not allow, or what the run does not ask for. It is in
                the ledger, if there is one.
        """
        first = isinstance(request, DescribeRequest)
        guard = self.guard(request.run.run) if self.guarded else None
        if guard is not None:
            guard.agree(request.run.configuration, first)
        if config is None:
            raise ProtocolError("run", f"configuration {request.run.configuration[:12]}… never came; resume the run")
        problem = self.policy.problem(config, request.run.parts) or _unfit(request, config)
        if problem is not None:
            number = getattr(request, "round", 0)
            raise guard.refused(number, "policy", problem) if guard is not None else Refusal("policy", problem)

    def lines_after(self, run: str, known: int) -> str | None:
        """New lines of its ledger, for a server whose run it signed a plan for; else None."""
        if not self.guarded:
            return None
        with contextlib.suppress(PrivacyError):
            guard = self.guard(run)
            with guard.ledger.locked():
                if guard.signed is not None:
                    return lines_after(guard.ledger.entries, known)
        return None

    def note(self, error: BaseException, what: str) -> None:
        """A line in the owner's own log: what the code that leaves does not say. It may quote data."""
        note(self.places.log, self.client, error, what)

    def load_personal(self, round_number: int) -> State:
        """What it kept of the model before a round (from 1); empty if nothing yet."""
        return load_personal(self.places.personal, self.client, round_number)

    def save_personal(self, round_number: int, tensors: State) -> None:
        """Keep what a round left."""
        save_personal(self.places.personal, self.client, round_number, tensors)


def _unfit(request: Request, config: RunConfig) -> str | None:
    """What keeps a request from being one that a run of this configuration makes, or None."""
    noised = config.privacy.scores_sigma is not None
    if isinstance(request, EvaluateRequest) and SCORES not in public_names(config) and not noised:
        return "local scores are not covered by the noise; privacy.share_metrics = true would send them"
    if isinstance(request, GramRequest) and config.gram is None:
        return "this configuration has no release at a task's end"
    if isinstance(request, PrepareRequest | ConfirmRequest | UnmaskRequest) and not purposes(config):
        return "this configuration has no secure sums"
    if isinstance(request, ReceiptsRequest) and config.privacy.unit != "example":
        return "this configuration's clients keep no ledgers"
    return None


class Owners(Protocol):
    """The owners on one node."""

    @property
    def exclusive(self) -> bool:
        """Whether they are on this node and on no other."""

    @property
    def threads(self) -> int | None:
        """Torch threads of this machine's own choosing; None: those of the run."""

    @property
    def open(self) -> Callable[[str], Session]:
        """Opens model and data for a resolved configuration."""

    @property
    def store(self) -> Path:
        """Where the node keeps what came once."""

    @property
    def log(self) -> Path:
        """Where the node says why something came to nothing."""

    def present(self, asked: Sequence[str]) -> list[str]:
        """Who answers when the server asks who is there, and names ``asked`` itself."""

    def one(self, client: str) -> Owner:
        """The owner of this name. Raises ProtocolError if it is not here."""

    def admit(self, request: Request, clients: Sequence[str], config: RunConfig | None) -> None:
        """The gate for a request that concerns these clients; see ``Owner.admit``."""


@dataclass(frozen=True)
class SingleOwner:
    """The one owner of a machine of its own."""

    owner: Owner
    open: Callable[[str], Session] = open_session
    threads: int | None = None
    exclusive: bool = True

    @property
    def store(self) -> Path:
        """Where the node keeps what came once."""
        return self.owner.places.store

    @property
    def log(self) -> Path:
        """The owner's own."""
        return self.owner.places.log

    def present(self, asked: Sequence[str]) -> list[str]:
        """Itself, whoever was asked for."""
        return [self.owner.client]

    def one(self, client: str) -> Owner:
        """Itself. Raises ProtocolError for another name."""
        if client != self.owner.client:
            raise ProtocolError(
                "clients", f"this node belongs to {self.owner.client}; it was asked to act for {client}"
            )
        return self.owner

    def admit(self, request: Request, clients: Sequence[str], config: RunConfig | None) -> None:
        """The owner's own gate, whoever is named. Raises ProtocolError for another name."""
        self.owner.admit(request, config)
        for client in clients:
            self.one(client)


@dataclass(frozen=True)
class SimulatedOwners:
    """All owners of a simulation, which any of its nodes can play."""

    config: RunConfig
    places: Places
    open: Callable[[str], Session] = open_session
    threads: int | None = None  # those of the run
    exclusive: bool = False

    @property
    def store(self) -> Path:
        """Where the nodes keep what came once."""
        return self.places.store

    @property
    def log(self) -> Path:
        """The run's."""
        return self.places.log

    def present(self, asked: Sequence[str]) -> list[str]:
        """Those that this node is asked to play."""
        return list(asked)

    def one(self, client: str) -> Owner:
        """Any client of the partition. Raises PrivacyError if its ledger's directory is not on this machine."""
        if self.config.private and not self.places.ledgers.is_dir():
            raise PrivacyError(
                f"the ledgers' directory {str(self.places.ledgers)!r} is not on this machine; put it on a file system"
                " that all nodes share"
            )
        privacy = self.config.privacy
        policy = SimulationPolicy(privacy.unit)
        return Owner(client, self.places, policy, identity(self.config.data), privacy.budget)

    def admit(self, request: Request, clients: Sequence[str], config: RunConfig | None) -> None:
        """They allow what the run says. Their ledgers are asked later, client by client: one that is broken is its own
        client's matter.
        """
        if (problem := _unfit(request, self.config)) is not None:
            raise Refusal("policy", problem)


def simulated_owners(config: RunConfig, directory: str) -> SimulatedOwners:
    """The owners of a simulation whose run directory this is. Raises RunFailed if it is not on this machine."""
    if not (path := Path(directory)).is_dir():
        raise RunFailed(
            f"the run directory {directory!r} is not on this machine; put it on a file system that all nodes share"
        )
    return SimulatedOwners(config, simulated_places(config, path))


def own_owner(file: ClientFile, run: str, sessions: Callable[[str], Session]) -> SingleOwner:
    """The owner of a machine of its own, from its own file.

    Args:
        file: as whoever started the client wrote it.
        run: what is asked for, by its id.
        sessions: opens its data and its copy of the model for a resolved configuration.
    """
    client, home = file.client.id, file.home
    ledgers = home / "ledger"
    places = Places(ledgers, below(home / "personal", run), home / "bases", ledgers / LOG)
    roster = dict(file.roster) or None
    owner = Owner(client, places, OwnPolicy.of(file), identity(file.data.section(2)), file.counted_budget, roster)
    return SingleOwner(owner, sessions, file.machine.threads)


@lru_cache(maxsize=4096)
def _ledger(directory: Path, client: str, source: str, run: str) -> Ledger:
    """One object per file, run and process: it verifies only what it has not seen yet."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = load_or_create_key(below(directory, "keys", f"{client}.pem"))
    path = below(directory, f"{client}.jsonl")
    return Ledger(path, client, keyed_hash(key, "dataset", source), key)


def own_identity(file: ClientFile) -> str:
    """The public key of a client's ledger, which its peers enter in their [roster]; made if there is none yet."""
    return public_hex(load_or_create_key(below(file.home / "ledger", "keys", f"{file.client.id}.pem")))
