"""``fedlab init``: a commented configuration made from the columns of somebody's data."""

from __future__ import annotations

import json
from pathlib import Path

from fedlab.errors import ConfigError
from fedlab.files import create
from fedlab.identifiers import checked_identifier

MOST_LABELS = 100  # different values of a column that can be labels
TEXTS, LABELS = ("text", "note", "sentence", "prompt", "content"), ("label", "topic", "class", "category", "answer")


def write_client(
    data: Path, out: Path, client: str, server: str, text: str | None, label: str | None, model: str
) -> None:
    """A client's own file for a file of records.

    Args:
        data: records, in a format of ``data.source = "files"``.
        out: the file to write; one that is there is never replaced.
        client: the client's id.
        server: host:port of the server.
        text, label: its columns; None: guessed from their names and values.
        model: a base model that may be run on the data.

    Raises:
        ConfigError: the data cannot be read, no column is like a text or a label, or the file is there.
    """
    checked_identifier(client, "--client")
    text, label, names = columns_of(data, text, label)
    content = f"""# What client {client} is, has and allows. All of it is this machine's own: no server changes it.
# Paths are relative to this file. What would become of a run here: fedlab client --check {out.name} RUN.toml

[client]
id = {json.dumps(client)}
server = {json.dumps(server)}   # as the coordinator gave it
ca = "ca.crt"   # from the coordinator (fedlab keys init)
key = "{client}.key"   # fedlab keys node {client}; its .pub goes to the coordinator

[data]
path = {json.dumps(str(data.resolve()))}
text = {json.dumps(text, ensure_ascii=False)}
label = {json.dumps(label, ensure_ascii=False)}   # found here: {", ".join(names[:8])}{", …" if len(names) > 8 else ""}
held_out = 0.1                    # share that is never trained on

[models.{json.dumps(model)}]   # one for each base model that may be run on the data
# path = "models/…"               # this machine's copy; else an installed package, or the hub's cache
# sha256 = ["…"]                  # what its files may hash to: fedlab client --check prints it

[policy]                          # everything else is refused
unit = "example"                  # one record is protected
max_epsilon = 3.0                 # most ε that one run may spend
max_delta = 1e-5
min_batch = 16

[budget]                          # over all runs, for good
epsilon = 8.0
"""
    _write(out, content)


def write_run(data: Path, out: Path, text: str | None, label: str | None, model: str) -> None:
    """A run's configuration for a file of records. Arguments and errors as of ``write_client``."""
    text, label, names = columns_of(data, text, label)
    content = f"""# A run: what all parties agree on. fedlab explain KEY says what a key means.
# fedlab simulate {out.name}   plays the clients on this machine; fedlab run {out.name} --server …   asks real ones.

[run]
name = {json.dumps(out.stem)}
rounds = 10

[model]
name = {json.dumps(model)}

[objective]
labels = {json.dumps(names, ensure_ascii=False)}

[data]                            # of a simulation; real clients read their own files
source = "files"
path = {json.dumps(str(data.resolve()))}
text = {json.dumps(text, ensure_ascii=False)}
label = {json.dumps(label, ensure_ascii=False)}
clients = 3                       # simulated, or expected

[lora]
rank = 8
alpha = 16
target_modules = "auto"

[strategy]
name = "fedsvd"

[train]
steps = 4
batch_size = 32
lr = 0.5

[privacy]
unit = "example"
noise = "secure"
epsilon = 3.0
delta = 1e-5
clip = 1.0
"""
    _write(out, content)


def columns_of(data: Path, text: str | None, label: str | None) -> tuple[str, str, list[str]]:
    """Text column, label column and the labels' names, sorted. Raises ConfigError as ``write_client``."""
    from fedlab.data.tables import read_columns  # here: numpy comes with it

    columns = read_columns(str(data))
    for key, name in (("--text", text), ("--label", label)):
        if name is not None and name not in columns:
            raise ConfigError(f"{key} {name!r}: {str(data)!r} has the columns {', '.join(map(repr, columns))}")
    different = {name: len(set(values)) for name, values in columns.items()}
    text = text or _named(columns, TEXTS) or max(columns, key=lambda name: sum(map(len, map(str, columns[name]))))
    few = [name for name in columns if name != text and 1 < different[name] <= MOST_LABELS]
    label = label or _named(columns, LABELS) or min(few, key=lambda name: different[name], default=None)
    if label is None or label == text:
        raise ConfigError(
            f"{str(data)!r} has no column like a label (2 to {MOST_LABELS} different values) beside the text {text!r};"
            " name one with --label"
        )
    return text, label, sorted({str(value) for value in columns[label] if value is not None})


def _named(columns: object, names: tuple[str, ...]) -> str | None:
    known = {str(column).lower(): str(column) for column in columns}  # type: ignore[attr-defined]
    return next((known[name] for name in names if name in known), None)


def _write(out: Path, content: str) -> None:
    if not out.parent.is_dir():
        raise ConfigError(f"--out {str(out)!r}: its directory is not there")
    if not create(out, content):
        raise ConfigError(f"--out {str(out)!r} is there already; nothing is replaced, choose another name")
