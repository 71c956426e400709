"""``edition-1`` and ``edition-2`` were written by earlier editions. Ledgers are kept for years: both are read and
continued.

``edition-3`` is what is written now: the same history is these bytes. Its PLANs say whether noise is shared.
"""

from __future__ import annotations

import importlib.util
import sys
from datetime import datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fedlab.privacy.accounting import Event
from fedlab.privacy.audit.chain import read_chain
from fedlab.privacy.audit.receipts import compare, read_receipts
from fedlab.privacy.audit.rules import read_ledger
from fedlab.privacy.audit.schema import CLIENT
from fedlab.privacy.audit.schema import SERVER as SERVER_TYPES
from fedlab.privacy.ledger import ledger as writer
from fedlab.privacy.ledger.guard import Guard, Refusal
from fedlab.privacy.ledger.keys import public_hex
from fedlab.privacy.ledger.ledger import FIELDS, Ledger, check_chain, lines_after, parse_lines
from fedlab.privacy.ledger.mirror import LedgerMirror
from fedlab.privacy.ledger.terms import budget_terms, plan_terms, run_terms, scope_of

HERE = Path(__file__).parent
EARLIER = [
    tuple((HERE / edition / name).read_bytes() for name in ("client-0.jsonl", "receipts.jsonl"))
    for edition in ("edition-1", "edition-2")
]
NOW = [(HERE / "edition-3" / name).read_bytes() for name in ("client-0.jsonl", "receipts.jsonl")]


class Fixed(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 1, tzinfo=tz)


def history() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ledger_history", HERE / "history.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ledger_history"] = module
    spec.loader.exec_module(module)
    return module


def test_the_same_history_is_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "datetime", Fixed)
    parts = SimpleNamespace(
        Event=Event, Ledger=Ledger, lines_after=lines_after, Guard=Guard, Refusal=Refusal, plan_terms=plan_terms,
        budget_terms=budget_terms, run_terms=run_terms, scope_of=scope_of, LedgerMirror=LedgerMirror,
    )  # fmt: skip
    owned, receipts = history().write_history(tmp_path, parts)
    assert owned.splitlines() == NOW[0].splitlines()
    assert receipts.splitlines() == NOW[1].splitlines()


def test_every_kind_of_line_is_in_the_history():
    kinds = {entry["type"] for entry in parse_lines(b"".join(NOW).decode())}
    assert kinds == FIELDS.keys()


@pytest.mark.parametrize(("owned", "receipts"), EARLIER, ids=["1", "2"])
def test_ledgers_of_earlier_editions_are_read_and_continued(tmp_path: Path, owned: bytes, receipts: bytes):
    made = history()
    entries = parse_lines(owned.decode())
    check_chain(entries, "client-0", public_hex(made.key(1)))
    (tmp_path / "client-0.jsonl").write_bytes(owned)
    ledger = Ledger(tmp_path / "client-0.jsonl", "client-0", "d" * 64, made.key(1))
    with ledger.locked():
        ledger.append("REFUSE", "b" * 32, round=0, kind="plan-mismatch", reason="another run")
    assert len(ledger.entries) == len(entries) + 1
    assert ledger.path.read_bytes().startswith(owned)


@pytest.mark.parametrize(("owned", "signed"), EARLIER, ids=["1", "2"])
def test_the_auditor_finds_nothing_in_ledgers_of_earlier_editions(owned: bytes, signed: bytes):
    ledger = read_ledger(read_chain(owned, "client-0", "client-0", CLIENT, "PLAN"))
    receipts = read_receipts(read_chain(signed, "receipts.jsonl", "server", SERVER_TYPES, "START"))
    assert ledger.findings == receipts.findings == ()
    assert list(compare(receipts, {"client-0": ledger})) == []
    assert ledger.events() == [Event("poisson", 0.05, 0.9, 4)] * 3
