"""The ClientApp: one handler per message, each a few lines over ``fedlab``.

A message names the clients of this node's cohort and carries the run's configuration; model and data are opened once
per process.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.basis import bases_directory, held, keep
from clients.describe import DESCRIPTION, describe_client, keep_receipts
from clients.evaluate import evaluate_cohort
from clients.gram import gram_message, keys_message
from clients.train import train_message
from fedlab.errors import FedlabError, PrivacyError
from fedlab.lora.state import from_wire
from fedlab.session import Session, open_session, torch_threads

app = ClientApp()


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Which clients this node hosts, how large they are, what one round costs each, and their ledgers so far."""
    session, cohort = _open(message, context)
    order = message.content.config_records["round"]
    entries = [describe_client(session, client, order, context) for client in cohort]
    answer = ConfigRecord({key: [entry[key] for entry in entries] for key in DESCRIPTION})
    answer["pinned"] = "client" in context.node_config
    return Message(RecordDict({"clients": answer}), reply_to=message)


@app.query("release")
def release(message: Message, context: Context) -> Message:
    """Keep the server's receipts, and send whatever lines of the ledgers it does not know yet."""
    session, cohort = _open(message, context)
    return Message(keep_receipts(session, cohort, message.content, context), reply_to=message)


@app.query("keys")
def keys(message: Message, context: Context) -> Message:
    """Fresh keys for a sum that hides what each client adds to it."""
    _, cohort = _open(message, context)
    return Message(keys_message(cohort, message.content, context), reply_to=message)


@app.query("gram")
def gram(message: Message, context: Context) -> Message:
    """At the end of a stream's task: which inputs it used, as a charged and noised sum."""
    session, cohort = _open(message, context)
    with torch_threads(session.config.run.threads):
        return Message(gram_message(session, cohort, message.content, context), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Local training of the cohort; a client that fails is named in ``failures`` and the others go on."""
    session, cohort = _open(message, context)
    with torch_threads(session.config.run.threads):
        return Message(train_message(session, cohort, message.content, context), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Accuracy of the global model on every cohort client's held-out examples; withheld under DP unless it is to be
    shared.
    """
    session, cohort = _open(message, context)
    if session.config.private and not session.config.privacy.share_metrics:
        raise PrivacyError("local accuracy is not covered by the noise; privacy.share_metrics = true would send it")
    with torch_threads(session.config.run.threads):
        return Message(evaluate_cohort(session, cohort, message.content, context), reply_to=message)


def _open(message: Message, context: Context) -> tuple[Session, list[str]]:
    """The process's session and the cohort; a node that belongs to one client serves no other."""
    record = message.content.config_records["round"]
    session = open_session(cast(str, record["config"]))
    if name := cast(str, record.get("basis", "")):
        directory = bases_directory(record, context)
        if "basis" in message.content.array_records:  # sent once, before a task's first round
            arrays = message.content.array_records["basis"]
            if keep(directory, from_wire({key: array.numpy() for key, array in arrays.items()})) != name:
                raise FedlabError("the basis that came is not the one that was announced")
        session = replace(session, basis=held(directory, name))
    cohort = list(cast(list[str], record["clients"]))
    own = context.node_config.get("client")
    if own is not None and message.metadata.message_type.startswith("query"):
        cohort = [str(own)]
    if own is not None and cohort != [own]:
        raise FedlabError(f"this node belongs to {own}; it was asked to act for {', '.join(cohort)}")
    return session, cohort
