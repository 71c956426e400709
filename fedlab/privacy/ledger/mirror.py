"""The server's side of the ledgers: it reads every line a client sends, countersigns every update it receives, and
keeps the receipts.

A client's chain shows that nothing in the middle was changed; only somebody else's memory shows that its end was not
cut off and no older copy was put back. That memory is ``receipts.jsonl`` of the run, and ``heads.json`` beside ledgers
that several runs share.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlab.errors import PrivacyError
from fedlab.files import fsync_directory, write
from fedlab.privacy.accounting import Event
from fedlab.privacy.ledger.keys import load_or_create_key
from fedlab.privacy.ledger.ledger import (
    NO_DATASET,
    SERVER,
    Entry,
    Ledger,
    canonical,
    check_chain,
    event_of,
    events,
    parse_lines,
)


class LedgerMirror:
    """What the server of one run knows of its clients' ledgers. Nothing in it is believed unsigned.

    Args:
        run_path: the run directory.
        run: the run's id.
        ledgers: where simulated clients' own files lie; of files that are not in the run's own ``ledger/``, verified
            copies are kept there. The last line of every ledger is remembered beside originals that lie elsewhere.
    """

    def __init__(self, run_path: Path, run: str, ledgers: Path) -> None:
        self.run = run
        self._copies, self._ledgers = run_path / "ledger", ledgers
        shared = ledgers.absolute() != self._copies.absolute()
        self._heads_file = ledgers / "heads.json" if shared else None
        self._copies.mkdir(parents=True, exist_ok=True)
        self.key = load_or_create_key(ledgers / "keys" / "server.pem")  # one for all runs that share ledgers
        self._own = Ledger(run_path / "receipts.jsonl", SERVER, NO_DATASET, self.key)
        self._clients: dict[str, list[Entry]] = {}
        self._keys: dict[str, str] = {}

    def enrol(self, client: str, public: str, text: str) -> None:
        """Take a client's key and its whole ledger.

        Args:
            client: the client's id.
            public: its public key, 64 hex digits.
            text: the file.

        Raises:
            PrivacyError: the chain is broken, or older than what was receipted.
        """
        entries = parse_lines(text)
        check_chain(entries, client, public)
        with self._own.locked():
            if self._named().get(client, public) != public:
                raise PrivacyError(f"ledger of {client}: it is signed with another key than before in this run")
            seen = [
                (e["number"], e["head"]) for e in self._own.entries if e["type"] == "RECEIPT" and e["client"] == client
            ]
        if entries and (head := self._heads().get(client, {}).get(entries[0]["dataset"])):
            seen.append((head[0], head[1]))
        for seq, head in seen:
            if seq >= len(entries) or entries[seq]["hash"] != head:
                raise PrivacyError(
                    f"ledger of {client}: it ends at line {len(entries)} or differs there, but line {seq + 1} was"
                    " receipted: its end was cut off, or an older copy was put back"
                )
        self._clients[client], self._keys[client] = [], public
        self._take(client, entries)

    def recall(self) -> list[str]:
        """Take this run's copies of the ledgers of clients that took part before and are not here now; who they are.

        Raises PrivacyError for a copy that is older than what was receipted.
        """
        with self._own.locked():
            keys = self._named()
        missing = [client for client in keys if client not in self._clients]
        for client in missing:
            path = self._copies / f"{client}.jsonl"
            data = path.read_bytes() if path.is_file() else b""
            self.enrol(client, keys[client], data[: data.rfind(b"\n") + 1].decode(errors="replace"))
        return missing

    def plan(self, client: str) -> Entry | None:
        """The plan that a client signed for this run; None if none is known."""
        return next((e for e in self.entries(client) if (e["type"], e["run"]) == ("PLAN", self.run)), None)

    def start(self, unit: str, config: str) -> None:
        """Name the server's key, the clients', and the hash of ``run.toml`` in ``receipts.jsonl``.

        Whoever was named once is named again, here or not.
        """
        with self._own.locked():
            clients = {**self._named(), **self._keys}
            self._own.append("START", self.run, key=self._own.public, unit=unit, clients=clients, config=config)

    def key_of(self, client: str) -> str | None:
        """The public key that a client enrolled with; None if it did not."""
        return self._keys.get(client)

    def known(self, client: str) -> int:
        """Number of a client's lines that are known; it need not send them again."""
        return len(self._clients.get(client, []))

    def accept(self, client: str, text: str) -> None:
        """Take new lines. Raises PrivacyError if they do not continue the known ones."""
        entries = parse_lines(text)
        known = self._clients[client]
        check_chain(entries, client, self._keys[client], known[-1] if known else None)
        self._take(client, entries)

    def entries(self, client: str) -> list[Entry]:
        """The verified lines of a client."""
        return self._clients.get(client, [])

    def events(self, client: str, run: str | None = None) -> list[Event]:
        """What a client was charged: in all, or in one run."""
        return events(self.entries(client), run)

    def witness(self, client: str, round_number: int, declared: Event, received: str, update: str | None) -> Entry:
        """Find an update in its client's ledger.

        Args:
            client: who sent it.
            round_number: of which round it is.
            declared: the event that the client's plan says a round is.
            received: digest of the state that was sent to the client.
            update: digest of the update; None where it came in a sum of several clients' and was not seen alone.

        Returns:
            Its COMMIT line.

        Raises:
            PrivacyError: the ledger does not show it charged and committed as it came.
        """
        charges = [
            e
            for e in self.entries(client)
            if e["type"] == "CHARGE" and (e["run"], e["round"]) == (self.run, round_number)
        ]
        if not charges:
            raise PrivacyError(f"its ledger shows no charge for round {round_number}")
        charge = charges[-1]
        if (found := event_of(charge["event"])) != declared:
            raise PrivacyError(f"it charged {found}, which is not what it declared")
        if charge["in"] != received:
            raise PrivacyError("it charged a round on another state than the one that was sent")
        commits = [e for e in self.entries(client) if e["type"] == "COMMIT" and e["charge"] == charge["hash"]]
        if not commits or (update is not None and commits[-1]["out"] != update):
            raise PrivacyError("its ledger does not commit the update that it sent")
        return commits[-1]

    def close_round(
        self,
        round_number: int,
        states: tuple[str, str, str],
        updates: Mapping[str, str | None],
        commits: Mapping[str, Entry],
    ) -> dict[str, Entry]:
        """Record a round, and countersign its commits: one write, so that no receipt is without its round.

        The receipts stand after the round in the chain: whoever keeps one has all that went before it.

        Args:
            round_number: from 1.
            states: digests of the state before the round, of what was sent of it, and of the state after.
            updates: client → digest of what came in; None where that is nobody's to know (unit ``client``).
            commits: client → the ledger line that commits it.

        Returns:
            client → its receipt; they are on the disk.
        """
        before, received, after = states
        entry = {"round": round_number, "before": before, "in": received, "out": after, "clients": dict(updates)}
        receipts = [
            {
                "key": self._own.public,
                "round": round_number,
                "client": client,
                "number": commit["seq"],
                "head": commit["hash"],
                "out": commit["out"],
            }
            for client, commit in commits.items()
        ]
        with self._own.locked():
            lines = [("ROUND", entry), *(("RECEIPT", receipt) for receipt in receipts)]
            written = self._own.append_all(lines, self.run)
        self._remember(commits)
        return dict(zip(commits, written[1:], strict=True))

    def final(self, files: Mapping[str, tuple[int, str]], state: str, status: str, more: Mapping[str, Entry]) -> None:
        """Seal the run in the last line of ``receipts.jsonl``.

        Args:
            files: path in the run directory → size and SHA-256.
            state: digest of the final state.
            status: how the run ended.
            more: owner → last line of ledgers that are not clients'.
        """
        last = {client: entries[-1] for client, entries in self._clients.items() if entries} | dict(more)
        heads = {owner: [entry["seq"], entry["hash"]] for owner, entry in last.items()}
        sealed = {name: [size, sha256] for name, (size, sha256) in sorted(files.items())}
        with self._own.locked():
            self._own.append("FINAL", self.run, heads=heads, files=sealed, state=state, status=status)
        self._remember({client: entry for client, entry in last.items() if client in self._clients})

    def catch_up(self, client: str) -> None:
        """Take what a simulated client's own file shows beyond what it came to send: it lies on the same disk.

        Raises PrivacyError if it does not continue the known lines.
        """
        path = self._ledgers / f"{client}.jsonl"
        if client not in self._clients or not path.is_file():
            return
        lines = path.read_bytes().decode(errors="replace").split("\n")[:-1]  # what a crash left of a line is none
        self.accept(client, "\n".join(lines[self.known(client) :]))

    def _named(self) -> dict[str, str]:
        """Client → the key that a START of this run named for it. Needs the lock."""
        return {c: key for e in self._own.entries if e["type"] == "START" for c, key in e["clients"].items()}

    def _take(self, client: str, entries: list[Entry]) -> None:
        known = [*self._clients[client], *entries]
        path = self._copies / f"{client}.jsonl"
        have = path.read_bytes() if path.is_file() else b""
        if (count := have.count(b"\n")) < len(known):  # never of a client's own file, which was written before it sent
            with path.open("r+b" if path.is_file() else "wb", buffering=0) as file:
                file.seek(have.rfind(b"\n") + 1)  # over what a crash left of a line
                file.truncate()
                file.write(b"".join(canonical(entry) + b"\n" for entry in known[count:]))
        self._clients[client] = known

    def _heads(self) -> dict[str, dict[str, list[Any]]]:
        if self._heads_file is None or not self._heads_file.is_file():
            return {}
        return dict(json.loads(self._heads_file.read_text(encoding="utf-8")))

    def _remember(self, last: Mapping[str, Entry]) -> None:
        if self._heads_file is None:
            return
        with self._heads_file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # several runs may share these ledgers at the same time
            heads = self._heads()
            for client, entry in last.items():
                known = heads.setdefault(client, {}).get(entry["dataset"])
                if known is None or known[0] < entry["seq"]:
                    heads[client][entry["dataset"]] = [entry["seq"], entry["hash"]]
            write(self._heads_file, json.dumps(heads, indent=1))
            fsync_directory(self._heads_file.parent)
