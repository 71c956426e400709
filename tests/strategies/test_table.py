"""The table in the docs is the one that the classes declare."""

from __future__ import annotations

from pathlib import Path

from strategies import STRATEGIES
from strategies.table import COLUMNS, markdown, rows


def test_the_docs_hold_the_generated_table():
    text = (Path(__file__).resolve().parents[2] / "docs" / "strategies.md").read_text(encoding="utf-8")
    assert markdown() in text, "print strategies.table.markdown() into docs/strategies.md"


def test_a_row_per_strategy():
    assert [row[0].strip("`") for row in rows()] == list(STRATEGIES)
    assert all(len(row) == len(COLUMNS) and all(row) for row in rows())
