"""The server's part in a secure sum: pure, and trusted with nothing but bringing it to an end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np

from fedlab.errors import SumRefused
from fedlab.privacy.secure_sum.graph import Graph
from fedlab.privacy.secure_sum.keys import commitment_of, is_confirmation, is_mask_key, public_of, setting_digest
from fedlab.privacy.secure_sum.masking import shifted
from fedlab.privacy.secure_sum.participant import graph_for, mask_private, pair_mask, self_mask
from fedlab.privacy.secure_sum.shares import combine
from fedlab.protocol.sum_messages import MaskKey, Preparation, SumKey, SumOrder, SumPlan, SumSetting, UnmaskOrder

TRIES = 100  # to put a secret together where somebody sent wrong shares


@dataclass
class Coordinator:
    """One secure sum at the server.

    Args:
        run: id of the run.
        setting: as all participants see it.
        keys: the participants' cipher keys.
    """

    run: str
    setting: SumSetting
    keys: Mapping[str, SumKey]
    prepared: dict[str, Preparation] = field(default_factory=dict)  # of those whose preparation is usable

    @cached_property
    def digest(self) -> str:
        """Of run and setting."""
        return setting_digest(self.run, self.setting)

    @cached_property
    def graph(self) -> Graph:
        """Who is whose neighbour. Raises SumRefused for a setting that no client would accept."""
        return graph_for(self.digest, self.setting)

    @cached_property
    def neighbours(self) -> dict[str, list[str]]:
        """Of every participant, in the order of its shares."""
        return {client: self.graph.neighbours(client) for client in self.setting.participants}

    def plan(self, clients: Iterable[str]) -> SumPlan:
        """What these clients are asked to prepare: the setting, and their neighbours' keys and their own."""
        return SumPlan(self.setting, {client: self.keys[client] for client in self._around(clients)})

    def accept(self, preparation: Preparation) -> str | None:
        """Take a participant's preparation; what is wrong with it, or None."""
        client, key = preparation.client, preparation.key
        if key is None or client not in self.setting.participants:
            return "it prepared nothing"
        if not is_mask_key(key, self.setting.participants[client], self.digest, client):
            return "its mask key is not signed for this sum"
        if set(preparation.sealed) != set(self.neighbours[client]):
            return "its shares are not for its neighbours"
        self.prepared[client] = preparation
        return None

    def order(self, clients: Iterable[str]) -> SumOrder:
        """What goes with a request to these clients, whose answers are masked: their keys and their neighbours'."""
        return SumOrder(self.setting.name, {client: self._key(client) for client in self._around(clients)})

    def is_confirmed(self, client: str, signature: str, dropped: Collection[str]) -> bool:
        """Whether a participant signed that these dropped out."""
        identity = self.setting.participants.get(client, "")
        return is_confirmation(identity, signature, self.digest, frozenset(dropped))

    def unmask_order(self, client: str) -> UnmaskOrder:
        """The shares that were sealed for a client."""
        return UnmaskOrder(client, {peer: self.prepared[peer].sealed[client] for peer in self.neighbours[client]})

    def unmasked(
        self,
        total: Mapping[str, np.ndarray],
        inside: Collection[str],
        shares: Mapping[str, Mapping[str, str]],
    ) -> dict[str, np.ndarray]:
        """The sum of what those ``inside`` masked.

        Args:
            total: sum of their masked values, modulo 2⁶⁴.
            inside: whose values are in it.
            shares: who revealed → whose → share.

        Raises:
            SumRefused: too few shares of somebody's secret were revealed, or wrong ones.
        """
        added, subtracted = list[bytes](), list[bytes]()  # by the clients; here it is the other way round
        for client in self.setting.participants:
            found, key = self._numbered(client, shares), self._key(client)
            if client in inside:
                seed = self._secret(client, found, partial(_is_seed, key.commitment))
                added.append(self_mask(seed, self.digest))
                continue
            private = mask_private(self._secret(client, found, partial(_is_mask_secret, key.public)))
            for peer in self.neighbours[client]:
                if peer in inside:
                    stream = pair_mask(private, self._key(peer).public, self.digest)
                    (added if peer < client else subtracted).append(stream)
        return shifted(total, subtracted, added)

    def _key(self, client: str) -> MaskKey:
        key = self.prepared[client].key
        assert key is not None
        return key

    def _numbered(self, client: str, shares: Mapping[str, Mapping[str, str]]) -> dict[int, bytes]:
        """The shares of a client's secret, by number."""
        holders = enumerate((client, *self.neighbours[client]), 1)
        return {
            number: bytes.fromhex(shares[holder][client])
            for number, holder in holders
            if holder in shares and client in shares[holder]
        }

    def _secret(self, client: str, shares: Mapping[int, bytes], fits: Callable[[bytes], bool]) -> bytes:
        """The secret that fits to what the client said of it, from any of its shares that give it: some may be wrong.

        Raises SumRefused where none does.
        """
        threshold, numbers = self.graph.threshold, sorted(shares)
        if len(numbers) < threshold:
            raise SumRefused(f"{len(numbers)} shares of a secret of {client} were revealed, {threshold} are needed")
        rng = np.random.default_rng(0)  # of which shares are tried: any will do, unless some are wrong
        for tried in range(TRIES if len(numbers) > threshold else 1):
            chosen = numbers[:threshold] if tried == 0 else rng.choice(numbers, threshold, replace=False).tolist()
            with contextlib.suppress(ValueError):
                secret = combine({number: shares[number] for number in chosen})
                if fits(secret):
                    return secret
        raise SumRefused(f"the shares of a secret of {client} do not give it: somebody sent wrong ones")

    def _around(self, clients: Iterable[str]) -> list[str]:
        """Clients and their neighbours."""
        return list(dict.fromkeys(peer for client in clients for peer in (client, *self.neighbours[client])))


def _is_seed(commitment: str, secret: bytes) -> bool:
    return commitment_of(secret) == commitment


def _is_mask_secret(public: str, secret: bytes) -> bool:
    return public_of(mask_private(secret)) == public
