"""Sums of which the server learns nothing but the sum: pairwise masks that cancel (after Bonawitz et al., arXiv
1611.04482).

Every client makes a fresh X25519 key; each pair derives one key stream from its shared secret, which one of the two
adds and the other subtracts, modulo 2⁶⁴. Whoever sees a masked value sees uniform noise; the masks of all clients add
up to zero. If one of them is missing the sum is noise: it is asked for again, with fresh keys, from the same clients
only, since two sums over different clients differ by what those have who are in one of them alone (``clients.gram``
refuses). Holds against a server that is curious and follows the protocol; one that invents clients with keys of its own
is not kept out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlab.errors import PrivacyError


def new_key() -> bytes:
    """A fresh private key, 32 bytes, for one sum."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_of(private: bytes) -> str:
    """Its public key, in hex."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw().hex()


def masked(
    values: Mapping[str, np.ndarray], private: bytes, client: str, peers: Mapping[str, str], context: str, least: int
) -> dict[str, np.ndarray]:
    """``values`` (int64 arrays) plus this client's masks towards all ``peers`` (client → public key, itself included),
    modulo 2⁶⁴.

    ``context`` names the sum (run, attempt): the same keys never mask two sums alike. Raises PrivacyError if fewer than
    ``least`` clients take part, if two share a key, if this client's own key is not in it as it made it, or for a key
    that is none.
    """
    if len(peers) < least:
        raise PrivacyError(f"{len(peers)} clients would be added up, at least {least} are needed to hide one")
    if len(set(peers.values())) < len(peers):
        raise PrivacyError("two clients of this sum have the same key; a sum needs a fresh key of every client")
    if peers.get(client) != public_of(private):
        raise PrivacyError(f"the server lists another key of {client} than the one that it made")
    total = {name: value.astype(np.int64).view(np.uint64).copy() for name, value in values.items()}
    for peer, public in sorted(peers.items()):
        if peer == client:
            continue
        key = _pair_key(private, public, client, peer, context)
        for name, value in sorted(total.items()):
            mask = _stream(key, name, value.size).reshape(value.shape)
            total[name] = value + mask if client < peer else value - mask
    return {name: value.view(np.int64) for name, value in total.items()}


def add(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums modulo 2⁶⁴ by name; either may lack a name."""
    result = dict(first)
    for name, value in second.items():
        mine = value.astype(np.int64).view(np.uint64)
        result[name] = (result[name].view(np.uint64) + mine).view(np.int64) if name in result else mine.view(np.int64)
    return result


def _pair_key(private: bytes, public: str, client: str, peer: str, context: str) -> bytes:
    try:
        secret = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(bytes.fromhex(public))
        )
    except ValueError as error:
        raise PrivacyError(f"the key of {peer} is no X25519 public key: {error}") from None
    info = "|".join(("fedlab-mask-v1", context, *sorted((client, peer)))).encode()
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(secret)


def _stream(key: bytes, name: str, count: int) -> np.ndarray:
    """``count`` uniform 64-bit numbers of this pair for this tensor."""
    nonce = hashlib.sha256(name.encode()).digest()[:16]
    encryptor = Cipher(algorithms.AES(key), modes.CTR(nonce)).encryptor()
    return np.frombuffer(encryptor.update(bytes(8 * count)), dtype="<u8")
