"""A client's keys of masked sums: made on request, used once, and gone.

Two sums over different clients differ by what those have who are in one of them alone. So a client is in sums over one
set of clients: the first, which it writes down before it sends anything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from clients.node import Node
from clients.owner import Owner
from fedlab.errors import PrivacyError
from fedlab.files import below
from fedlab.privacy.secure_sum.masking import masked, new_key, public_of
from fedlab.protocol.messages import KeysReply, KeysRequest


def answer_keys(node: Node, request: KeysRequest) -> KeysReply:
    """A fresh public key of every client, whose private part waits here for the sum."""
    return KeysReply({client: _new_key(node.owners.one(client), request.run.run) for client in request.clients})


def hide(
    owner: Owner, values: Mapping[str, np.ndarray], run: str, attempt: int, keys: Mapping[str, str], least: int
) -> dict[str, np.ndarray]:
    """The values (int64) under this client's masks towards all of ``keys`` (client → public key).

    Raises PrivacyError without a key of its own, for another set of clients than before, or for fewer than ``least``.
    """
    path = key_file(owner, run)
    try:
        private = path.read_bytes()
    except OSError:
        raise PrivacyError(
            f"{owner.client} has no key for this sum: none was asked for, or it was used already"
        ) from None
    path.unlink()
    first, now = path.with_suffix(".peers"), "\n".join(sorted(keys))
    with contextlib.suppress(FileExistsError):
        _write_new(first, now.encode())
    if first.read_text(encoding="utf-8") != now:
        raise PrivacyError(
            f"{owner.client} was asked for a sum over other clients before: the difference of both would show single"
            " ones"
        )
    return masked(values, private, owner.client, keys, f"{run}|{attempt}", least)


def key_file(owner: Owner, run: str) -> Path:
    """Where a client's private key of this run's sum waits."""
    return below(owner.places.store, "keys", f"{owner.client}-{run}.key")


def _new_key(owner: Owner, run: str) -> str:
    private, path = new_key(), key_file(owner, run)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    _write_new(path, private)
    return public_of(private)


def _write_new(path: Path, data: bytes) -> None:
    """Write a file for its owner's eyes, on the disk when this returns. Raises FileExistsError if it is there."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
