"""Whole conversations as one column of a table: lists of messages, each with a role and what was said.

Chat data sets keep them as ``[{"role": "user", "content": "…"}, …]``. A conversation is kept as such a list in JSON,
role first, so that files that write it in another way hold the same records.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fedlab.data.table import Column, Table, refuse, shown

ROLES = ("system", "user", "assistant")
FORM = 'a list of messages, as [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'


def conversations(table: Table, column: str) -> Column:
    """A column of conversations, each as JSON text; None where nothing stands.

    Raises:
        ConfigError: with the line, for a value that is no conversation, or one in which the assistant says nothing.
    """
    found: Column = []
    for value, line in zip(table.columns[column], table.lines, strict=True):
        if value is None or not value.strip():
            found.append(None)
            continue
        try:
            messages = json.loads(value)
        except ValueError:
            messages = None
        if problem := _problem(messages):
            refuse(table.path, f"column {shown([column])}: {problem}", line, table.unit)
        found.append(_written(messages))
    return found


def _problem(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        return f"want {FORM}"
    for one in messages:
        if not isinstance(one.get("role"), str) or not isinstance(one.get("content"), str):
            return f"a message without role or content, both text; want {FORM}"
        if one["role"] not in ROLES:
            return f"a role that is none of {', '.join(ROLES)}; leave such messages out, or rename the role"
    if messages[0]["role"] == "assistant":
        return "a conversation that the assistant begins: put first what it answers, or leave it out"
    if not any(one["role"] == "assistant" and one["content"].strip() for one in messages):
        return "a conversation in which the assistant says nothing: there is nothing to learn; leave it out"
    return None


def _written(messages: Sequence[dict[str, str]]) -> str:
    return json.dumps([{"role": m["role"], "content": m["content"]} for m in messages], ensure_ascii=False)
