"""One short history that writes every kind of line, by fixed keys at a fixed time: always the same bytes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

EVENT = ("poisson", 0.05, 0.9, 4)
STATE, OUT = "5" * 64, "6" * 64


def key(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)


def write_history(folder: Path, parts: Any) -> tuple[bytes, bytes]:
    """Bytes of the client's and of the server's file; ``parts`` has the classes and functions that write."""
    ledgers = folder / "ledgers"
    (ledgers / "keys").mkdir(parents=True)
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (ledgers / "keys" / "server.pem").write_bytes(key(2).private_bytes(*pem))
    terms = parts.plan_terms(
        parts.Event(*EVENT), unit="example", clip=1.5, normaliser=32.0, delta=1e-5, n=640, participations=3,
        noise="secure",
    )  # fmt: skip
    terms |= {
        "scope": parts.scope_of({"a.lora_B": (4, 2), "head.weight": (3, 8)}),
        "budget": parts.budget_terms(8.0, 1e-5),
        "content": "c" * 64,
        **parts.run_terms("f" * 64, ["timing", "size"]),
    }
    ledger = parts.Ledger(ledgers / "client-0.jsonl", "client-0", "d" * 64, key(1))
    guard = parts.Guard(ledger, "a" * 32)
    guard.plan(terms, {"fedlab": "0.1.0", "torch": "2.6"})
    mirror = parts.LedgerMirror(folder / "run", "a" * 32, ledgers)
    mirror.enrol("client-0", ledger.public, ledger.path.read_text())
    mirror.start("example", "f" * 64)
    for number in (1, 2):
        with guard.charge(terms, number, STATE) as commit:
            commit(4, OUT)
        mirror.accept("client-0", parts.lines_after(ledger.entries, mirror.known("client-0")))
        witnessed = mirror.witness("client-0", number, parts.Event(*EVENT), STATE, OUT)
        receipts = mirror.close_round(number, (STATE, STATE, OUT), {"client-0": OUT}, {"client-0": witnessed})
        guard.release(receipts["client-0"])
    with suppress(ValueError), guard.charge(terms, 3, STATE):
        raise ValueError("a text that quotes data")
    with suppress(parts.Refusal), guard.charge(terms, 4, STATE):
        pass
    with ledger.path.open("ab") as file:
        file.write(b'{"torn":')
    with ledger.locked():
        pass
    guard.close()
    mirror.accept("client-0", parts.lines_after(ledger.entries, mirror.known("client-0")))
    mirror.final({"adapter/adapter_config.json": (2, "e" * 64)}, OUT, "completed", {})
    return ledger.path.read_bytes(), (folder / "run" / "receipts.jsonl").read_bytes()
