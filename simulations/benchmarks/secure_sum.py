"""What a secure sum costs: seconds and bytes of one client and of the server, for many clients and parameters.

Every client prepares, masks and reveals, one after another in this process, and the sum is held against the plain one.
``--timed`` of the clients mask all parameters and are timed; of the others' the first thousand are added up. Seconds
are processor seconds of one thread.

    python simulations/benchmarks/secure_sum.py --clients 1000 --parameters 300000 --dropouts 0.05
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlab.privacy.ledger.keys import public_hex
from fedlab.privacy.secure_sum.coordinator import Coordinator
from fedlab.privacy.secure_sum.keys import new_private, public_of, signed_cipher_key
from fedlab.privacy.secure_sum.masking import add
from fedlab.privacy.secure_sum.participant import Prepared, confirmed, masked, prepare, revealed
from fedlab.protocol import encode
from fedlab.protocol.fields import RunReference
from fedlab.protocol.sum_messages import (
    Confirmation,
    ConfirmReply,
    PrepareReply,
    PrepareRequest,
    Revealed,
    SumSetting,
    UnmaskReply,
    UnmaskRequest,
)

T = TypeVar("T")
RUN = RunReference("a" * 32, "b" * 64, ())


def main(arguments: list[str] | None = None) -> bool:
    """Print one line per step; returns whether the sum was exact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--parameters", type=int, default=30_000)
    parser.add_argument("--colluding", type=int, default=0)
    parser.add_argument("--dropouts", type=float, default=0.05, help="share of the clients that mask and send nothing")
    parser.add_argument("--timed", type=int, default=20, help="clients that mask all parameters")
    options = parser.parse_args(arguments)
    names = [f"client-{i}" for i in range(options.clients)]
    identities = {name: Ed25519PrivateKey.generate() for name in names}
    ciphers = {name: new_private() for name in names}
    keys = {n: signed_cipher_key(identities[n], RUN.run, n, public_of(ciphers[n])) for n in names}
    participants = {name: public_hex(identities[name]) for name in names}
    survivors = (len(names) + options.colluding) // 2 + 1
    server = Coordinator(RUN.run, SumSetting("round-1-0", survivors, options.colluding, participants), keys)
    print(
        f"{len(names)} clients, {options.parameters} parameters, {server.graph.degree} neighbours each,"
        f" {server.graph.threshold} shares give a secret, {server.graph.quorum} confirmations a set"
    )
    prepared = _prepare(server, names, identities, ciphers)
    rng = np.random.default_rng(0)
    gone = set(rng.choice(names, round(options.dropouts * len(names)), replace=False).tolist())
    inside = [name for name in names if name not in gone]
    _mask(server, prepared, inside[: options.timed], options.parameters)
    total, plain = _mask(server, prepared, inside, min(options.parameters, 1000))
    shares = _reveal(server, prepared, gone, identities, ciphers)
    found = server.unmasked(total, set(shares), shares)
    exact = np.array_equal(found["x"], plain)
    print("the sum is exact" if exact else "THE SUM IS WRONG")
    whole = {"x": np.zeros(options.parameters, np.int64)}  # whatever they are, they take as long
    _timed("server: unmask", 1, lambda: server.unmasked(whole, set(shares), shares))
    return exact


def _prepare(
    server: Coordinator, names: list[str], identities: dict[str, Ed25519PrivateKey], ciphers: dict[str, bytes]
) -> dict[str, Prepared]:
    prepared = _timed(
        "client: prepare",
        len(names),
        lambda: {n: prepare(identities[n], ciphers[n], RUN.run, n, server.plan([n])) for n in names},
    )
    problems = _timed("server: check preparations", 1, lambda: [server.accept(p.reply) for p in prepared.values()])
    assert not any(problems)
    _bytes("prepare, to a client", "prepare", PrepareRequest(RUN, (names[0],), server.plan([names[0]])))
    _bytes("prepare, from a client", "prepare", PrepareReply((prepared[names[0]].reply,)))
    _bytes("keys that go with the round, to a client", "order", server.order([names[0]]))
    return prepared


def _mask(
    server: Coordinator, prepared: dict[str, Prepared], inside: list[str], parameters: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The sums of masked and of plain values."""
    total, plain, seconds = dict[str, np.ndarray](), np.zeros(parameters, np.int64), 0.0
    for number, name in enumerate(inside):
        values = np.random.default_rng(number).integers(-(2**40), 2**40, parameters)
        started = time.process_time()
        sent = masked(prepared[name], server.order([name]), {"x": values})
        seconds += time.process_time() - started
        total, plain = add(total, sent), plain + values
    print(f"{f'client: mask {parameters} numbers':45} {seconds / len(inside):10.4f} s each")
    print(f"{'  of them, from a client':45} {8 * parameters:10d} bytes", flush=True)
    return total, plain


def _reveal(
    server: Coordinator,
    prepared: dict[str, Prepared],
    gone: set[str],
    identities: dict[str, Ed25519PrivateKey],
    ciphers: dict[str, bytes],
) -> dict[str, dict[str, str]]:
    """Who revealed → whose → share."""
    inside, signed = [name for name in prepared if name not in gone], dict[str, str]()
    if gone:
        signed = _timed(
            "client: confirm", len(inside), lambda: {n: confirmed(identities[n], prepared[n], gone) for n in inside}
        )
        first = inside[0]
        _bytes("confirm, from a client", "confirm", ConfirmReply((Confirmation(first, signed[first]),)))
        signed = dict(list(signed.items())[: server.graph.quorum])
    orders = {name: server.unmask_order(name) for name in inside}
    shares = _timed(
        "client: reveal",
        len(inside),
        lambda: {n: revealed(ciphers[n], prepared[n], gone, signed, orders[n].sealed) for n in inside},
    )
    first, dropped = inside[0], tuple(sorted(gone))
    _bytes("unmask, to a client", "unmask", UnmaskRequest(RUN, "round-1-0", (orders[first],), dropped, signed))
    _bytes("unmask, from a client", "unmask", UnmaskReply((Revealed(first, shares[first]),)))
    return shares


def _timed(what: str, count: int, work: Callable[[], T]) -> T:
    started = time.process_time()
    found = work()
    print(f"{what:45} {(time.process_time() - started) / count:10.4f} s{' each' if count > 1 else ''}", flush=True)
    return found


def _bytes(what: str, kind: str, message: object) -> None:
    frame = encode(kind, message)
    print(f"{what:45} {len(frame.header) + len(frame.table) + len(frame.body):10d} bytes")


if __name__ == "__main__":
    main()
