"""Keys of secure sums: who agrees with whom on what secret, and who signed what.

Three kinds: an *identity* (Ed25519), which signs a client's ledger and which its peers know; a *cipher key* (X25519),
fresh in every run and signed by the identity, to which shares are sealed; a *mask key* (X25519), fresh in every sum and
signed together with the sum's setting. Everything that is signed or derived begins with a name of its own and is
length-prefixed, so that nothing signed for one purpose can be shown for another.
"""

from __future__ import annotations

import hashlib
import secrets
from functools import lru_cache

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlab.errors import SumRefused
from fedlab.privacy.ledger.keys import public_hex, verified
from fedlab.protocol.sum_messages import MaskKey, SumKey, SumSetting

NONCE = bytes(12)  # every sealing key seals one message


def new_private() -> bytes:
    """A fresh X25519 private key, 32 bytes."""
    return secrets.token_bytes(32)


def public_of(private: bytes) -> str:
    """The X25519 public key, in hex."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw().hex()


def derived(secret: bytes, purpose: str, *context: str) -> bytes:
    """32 bytes from a secret, for one purpose in one context (HKDF-SHA256, RFC 5869)."""
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=_named(purpose, *context)).derive(secret)


def agreed(private: bytes, public: str, purpose: str, *context: str) -> bytes:
    """32 bytes that whoever has either private key derives.

    Raises SumRefused for a public key that is none, or of low order.
    """
    try:
        other = X25519PublicKey.from_public_bytes(bytes.fromhex(public))
        secret = _key(private).exchange(other)
    except ValueError as error:
        raise SumRefused(f"{public[:64]!r} is no X25519 public key: {error}") from None
    return derived(secret, purpose, *context)


def commitment_of(seed: bytes) -> str:
    """What a client says of its self-mask seed beforehand: a seed that was put together from shares is held against
    it.
    """
    return hashlib.sha256(_named("fedlab-sum-seed-v1", seed.hex())).hexdigest()


def setting_digest(run: str, setting: SumSetting) -> str:
    """SHA-256 (hex) of a run and all that the participants of a sum must see alike."""
    participants = [part for pair in sorted(setting.participants.items()) for part in pair]
    numbers = (str(setting.survivors), str(setting.colluding))
    return hashlib.sha256(_named("fedlab-sum-setting-v1", run, setting.name, *numbers, *participants)).hexdigest()


def signed_cipher_key(identity: Ed25519PrivateKey, run: str, client: str, public: str) -> SumKey:
    """A client's cipher key of a run as it goes to its peers."""
    signature = identity.sign(_named("fedlab-sum-cipher-v1", run, client, public)).hex()
    return SumKey(public_hex(identity), public, signature)


def is_cipher_key(key: SumKey, run: str, client: str) -> bool:
    """Whether its identity signed it for this run and client."""
    return _verified(key.identity, key.signature, _named("fedlab-sum-cipher-v1", run, client, key.public))


def signed_mask_key(identity: Ed25519PrivateKey, setting: str, client: str, public: str, commitment: str) -> MaskKey:
    """A client's mask key of a sum (``setting``: its digest) as it goes to its peers."""
    signature = identity.sign(_named("fedlab-sum-mask-v1", setting, client, public, commitment)).hex()
    return MaskKey(public, commitment, signature)


def is_mask_key(key: MaskKey, identity: str, setting: str, client: str) -> bool:
    """Whether the identity signed it for this setting and client."""
    return _verified(identity, key.signature, _named("fedlab-sum-mask-v1", setting, client, key.public, key.commitment))


def confirmation(identity: Ed25519PrivateKey, setting: str, dropped: frozenset[str]) -> str:
    """A signature that these dropped out of a sum, and nobody else."""
    return identity.sign(_confirmed(setting, dropped)).hex()


def is_confirmation(identity: str, signature: str, setting: str, dropped: frozenset[str]) -> bool:
    """Whether the identity signed that these dropped out."""
    return _verified(identity, signature, _confirmed(setting, dropped))


def seal(private: bytes, public: str, content: bytes, *context: str) -> bytes:
    """``content`` for whoever has the private key of ``public``; ``context`` (sum, from, to) is authenticated.

    A pair and context seals one message: the key comes from both, the nonce is constant.
    """
    key = agreed(private, public, "fedlab-sum-seal-v1", *context)
    return ChaCha20Poly1305(key).encrypt(NONCE, content, _named("fedlab-sum-share-v1", *context))


def unseal(private: bytes, public: str, sealed: bytes, *context: str) -> bytes | None:
    """What was sealed in this context; None if it was not by the holder of ``public``, or was changed."""
    key = agreed(private, public, "fedlab-sum-seal-v1", *context)
    try:
        return ChaCha20Poly1305(key).decrypt(NONCE, sealed, _named("fedlab-sum-share-v1", *context))
    except InvalidTag:
        return None


def _confirmed(setting: str, dropped: frozenset[str]) -> bytes:
    return _named("fedlab-sum-confirm-v1", setting, *sorted(dropped))


def _named(purpose: str, *parts: str) -> bytes:
    """Parts that cannot run into each other, and what for."""
    return "".join(f"{len(part)}:{part}" for part in (purpose, *parts)).encode()


@lru_cache(maxsize=1)
def _key(private: bytes) -> X25519PrivateKey:
    """The key object of a private key, which is used with one neighbour after another."""
    return X25519PrivateKey.from_private_bytes(private)


@lru_cache(maxsize=2**14)
def _verified(identity: str, signature: str, message: bytes) -> bool:
    """As ``verified``; in a simulation thousands of clients ask the same."""
    return verified(identity, signature, message)
