"""Ed25519 keys: who signed a ledger line. Private keys stay in files that only their owner can read."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedlab.errors import PrivacyError
from fedlab.files import create


def load_or_create_key(path: Path) -> Ed25519PrivateKey:
    """The private key in ``path`` (PEM), made on first use with mode 0600.

    Raises PrivacyError if the file is no Ed25519 key.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        create(path, _new_pem())
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise PrivacyError(f"{path} holds no usable private key: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise PrivacyError(f"{path} holds a {type(key).__name__}, want an Ed25519 key")
    return key


def _new_pem() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public key, 64 hex digits."""
    return key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def keyed_hash(key: Ed25519PrivateKey, purpose: str, content: str) -> str:
    """HMAC-SHA256 (hex) under the private key: equal for equal content, and nobody else can test a guess."""
    secret = key.private_bytes(
        serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    )
    return hmac.new(secret, f"{purpose}:{content}".encode(), hashlib.sha256).hexdigest()


def verified(public: str, signature: str, message: bytes) -> bool:
    """Whether ``signature`` (hex) over ``message`` is by the key ``public`` (hex); False for anything malformed."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True
