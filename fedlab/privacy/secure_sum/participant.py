"""A client's part in a secure sum: pure functions of what it keeps and what the server says.

``prepare`` → ``masked`` → (``confirmed``) → ``revealed``. Nothing that the server says is believed: each function
raises SumRefused for what no honest server asks. That a client masks, confirms and reveals once in a sum is kept by
whoever calls them (``clients.secure_sum``), since it must survive a crash.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlab.errors import SumRefused
from fedlab.privacy.ledger.keys import public_hex
from fedlab.privacy.secure_sum.graph import Graph, graph_of
from fedlab.privacy.secure_sum.keys import (
    agreed,
    commitment_of,
    confirmation,
    derived,
    is_cipher_key,
    is_confirmation,
    is_mask_key,
    public_of,
    seal,
    setting_digest,
    signed_mask_key,
    unseal,
)
from fedlab.privacy.secure_sum.masking import shifted
from fedlab.privacy.secure_sum.shares import BYTES, new_secret, split
from fedlab.protocol.fields import ClientId, Digest, PublicKey, RunId, Share, Strict
from fedlab.protocol.sum_messages import Preparation, SumOrder, SumPlan, SumSetting


@dataclass(frozen=True)
class Prepared(Strict):
    """What a client keeps of a sum that it prepared. Secret, but for ``reply``."""

    run: RunId
    setting: SumSetting
    digest: Digest  # of run and setting
    keys: dict[ClientId, PublicKey]  # the neighbours' cipher keys
    mask_secret: Share  # its mask key comes from it
    seed: Share  # of its self-mask
    own: Share  # its own share of the seed
    reply: Preparation

    @property
    def client(self) -> str:
        """Whose it is."""
        return self.reply.client

    @property
    def graph(self) -> Graph:
        """The sum's."""
        return graph_for(self.digest, self.setting)


def graph_for(digest: str, setting: SumSetting) -> Graph:
    """The graph of a setting and its digest. Raises SumRefused; see ``graph_of``."""
    return graph_of(digest, tuple(sorted(setting.participants)), setting.survivors, setting.colluding)


def mask_private(mask_secret: bytes) -> bytes:
    """The private mask key (X25519) of a secret that is shared among the neighbours."""
    return derived(mask_secret, "fedlab-sum-mask-key-v1")


def pair_mask(private: bytes, public: str, digest: str) -> bytes:
    """The key of the stream that two neighbours share in a sum."""
    return agreed(private, public, "fedlab-sum-pair-v1", digest)


def self_mask(seed: bytes, digest: str) -> bytes:
    """The key of a client's own stream in a sum."""
    return derived(seed, "fedlab-sum-self-v1", digest)


def prepare(identity: Ed25519PrivateKey, cipher: bytes, run: str, client: str, plan: SumPlan) -> Prepared:
    """Fresh secrets of a client for a sum, and shares of them sealed for its neighbours.

    Args:
        identity: signs its ledger, and its mask key.
        cipher: its private cipher key of this run.
        run: id of the run.
        client: whose preparation it is.
        plan: the sum's setting, and the neighbours' cipher keys.

    Raises:
        SumRefused: the client is not in it, as itself; two participants are one; the setting would allow two sums or
            too small a one; or a neighbour's key is not signed by the identity that the setting names.
    """
    setting = plan.setting
    if setting.participants.get(client) != public_hex(identity):
        raise SumRefused(f"the sum lists another identity of {client} than its own, or none")
    if len(set(setting.participants.values())) < len(setting.participants):
        raise SumRefused("two participants of the sum have the same identity")
    digest = setting_digest(run, setting)
    graph = graph_for(digest, setting)
    peers = graph.neighbours(client)
    keys = {peer: _cipher_key(plan, run, peer) for peer in peers}
    if len({*keys.values(), public_of(cipher)}) < len(keys) + 1:
        raise SumRefused("two participants of the sum have the same cipher key")
    mask_secret, seed = new_secret(), new_secret()
    mask_shares = split(mask_secret, graph.threshold, len(peers) + 1)
    seed_shares = split(seed, graph.threshold, len(peers) + 1)
    sealed = {
        peer: seal(cipher, keys[peer], mask_shares[i] + seed_shares[i], digest, client, peer).hex()
        for i, peer in enumerate(peers, 1)
    }
    public = public_of(mask_private(mask_secret))
    key = signed_mask_key(identity, digest, client, public, commitment_of(seed))
    reply = Preparation(client, key, sealed)
    return Prepared(run, setting, digest, keys, mask_secret.hex(), seed.hex(), seed_shares[0].hex(), reply)


def masked(prepared: Prepared, order: SumOrder, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``values`` (int64 arrays) under the client's masks towards all its neighbours and its own, modulo 2⁶⁴.

    Raises SumRefused unless the order is of this sum and has every neighbour's key, signed for this very setting.
    """
    if order.name != prepared.setting.name:
        raise SumRefused(f"the sum {order.name} is not the one that was prepared, {prepared.setting.name}")
    client, publics = prepared.client, dict[str, str]()
    for peer in (client, *prepared.keys):
        key = order.keys.get(peer)
        if key is None:
            raise SumRefused(f"the mask key of {peer} is missing, without which nothing may be sent")
        if not is_mask_key(key, prepared.setting.participants[peer], prepared.digest, peer):
            raise SumRefused(f"the mask key of {peer} was not signed by it for this sum and these participants")
        publics[peer] = key.public
    if order.keys[client] != prepared.reply.key:
        raise SumRefused(f"the server lists another mask key of {client} than the one that it made")
    if len(set(publics.values())) < len(publics):
        raise SumRefused("two participants of the sum have the same mask key")
    private = mask_private(bytes.fromhex(prepared.mask_secret))
    streams = {peer: pair_mask(private, publics[peer], prepared.digest) for peer in prepared.keys}
    added = [self_mask(bytes.fromhex(prepared.seed), prepared.digest)]
    added += [key for peer, key in streams.items() if client < peer]
    return shifted(values, added, [key for peer, key in streams.items() if client > peer])


def confirmed(identity: Ed25519PrivateKey, prepared: Prepared, dropped: Collection[str]) -> str:
    """The client's signature that these dropped out and nobody else. Raises SumRefused; see ``check_dropped``."""
    return confirmation(identity, prepared.digest, check_dropped(prepared, dropped))


def revealed(
    cipher: bytes,
    prepared: Prepared,
    dropped: Collection[str],
    confirmations: Mapping[str, str],
    sealed: Mapping[str, str],
) -> dict[str, str]:
    """The client's share of every neighbour's secret: of the mask key of those that dropped out, else of the self-mask
    seed, and of its own seed.

    Args:
        cipher: its private cipher key of this run.
        prepared: of the sum.
        dropped: participants that sent nothing, as the server says.
        confirmations: who signed that; needed unless nobody dropped out.
        sealed: neighbour → the shares that it sealed for this client.

    Returns:
        Whose → share, in hex. A neighbour whose shares are not there, or were changed, is left out.

    Raises:
        SumRefused: no honest server says that, or too few participants confirmed it.
    """
    gone, graph = check_dropped(prepared, dropped), prepared.graph
    if gone:
        _check_quorum(prepared, gone, confirmations)
    if odd := sorted(set(sealed) - set(prepared.keys)):
        raise SumRefused(f"{odd[0]} is no neighbour in this sum")
    shares = {prepared.client: prepared.own}
    for peer, text in sealed.items():
        context = (prepared.digest, peer, prepared.client)
        content = unseal(cipher, prepared.keys[peer], bytes.fromhex(text), *context)
        if content is not None and len(content) == 2 * BYTES:
            shares[peer] = (content[:BYTES] if peer in gone else content[BYTES:]).hex()
    assert len(shares) <= graph.degree + 1
    return shares


def check_dropped(prepared: Prepared, dropped: Collection[str]) -> frozenset[str]:
    """Who dropped out, if the others may be added up.

    Raises SumRefused where this client is named, somebody is no participant, or fewer than the survivors are left.
    """
    gone, participants = frozenset(dropped), prepared.setting.participants
    if odd := sorted(gone - set(participants)):
        raise SumRefused(f"{odd[0]} is no participant of this sum")
    if prepared.client in gone:
        raise SumRefused(f"the server says that {prepared.client} dropped out, and asks it for shares")
    if (left := len(participants) - len(gone)) < prepared.setting.survivors:
        raise SumRefused(f"{left} clients would be added up, at least {prepared.setting.survivors} must be")
    return gone


def _check_quorum(prepared: Prepared, gone: frozenset[str], confirmations: Mapping[str, str]) -> None:
    """Raise SumRefused unless a quorum of participants signed that these dropped out."""
    participants, quorum = prepared.setting.participants, prepared.graph.quorum
    signed = [
        client
        for client, signature in confirmations.items()
        if client in participants and is_confirmation(participants[client], signature, prepared.digest, gone)
    ]
    if len(signed) < quorum:
        raise SumRefused(f"{len(signed)} participants confirmed who dropped out, {quorum} must")


def _cipher_key(plan: SumPlan, run: str, peer: str) -> str:
    """A neighbour's cipher key. Raises SumRefused unless its identity signed it for this run."""
    key = plan.keys.get(peer)
    if key is None or key.identity != plan.setting.participants[peer] or not is_cipher_key(key, run, peer):
        raise SumRefused(f"the cipher key of {peer} is missing, or its identity did not sign it for this run")
    return key.public
