"""The ClientApp: one handler per message, each a few lines over ``fedlab``.

A message names the clients of this node's cohort and carries the run's configuration; model and data are opened once per process.
"""

from __future__ import annotations

from typing import cast

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.evaluate import evaluate_cohort
from clients.train import train_cohort
from fedlab.errors import FedlabError
from fedlab.session import Session, open_session, torch_threads

app = ClientApp()


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Which clients this node hosts, how large they are, and what one round costs each of them."""
    session, cohort = _open(message, context)
    columns: dict[str, list[float]] = {"q": [], "sigma": [], "delta": []}
    steps: list[int] = []
    samplers: list[str] = []
    examples: list[int] = []
    for client in cohort:
        examples.append(session.data.size(client))
        if (plan := session.plan(client)) is not None:
            event = plan.event()
            for key, value in {"q": event.q, "sigma": event.sigma, "delta": plan.delta}.items():
                columns[key].append(value)
            steps.append(event.steps)
            samplers.append(event.sampler)
        else:
            for key in columns:
                columns[key].append(0.0)
            steps.append(0)
            samplers.append("none")
    answer = ConfigRecord(
        {"ids": cohort, "examples": examples, "steps": steps, "sampler": samplers, "pinned": "client" in context.node_config, **columns}
    )
    return Message(RecordDict({"clients": answer}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Local training of the cohort; a client that fails is named in ``failures`` and the others go on."""
    session, cohort = _open(message, context)
    with torch_threads(session.config.run.threads):
        return Message(train_cohort(session, cohort, message.content), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Accuracy of the global model on every cohort client's held-out examples."""
    session, cohort = _open(message, context)
    with torch_threads(session.config.run.threads):
        return Message(evaluate_cohort(session, cohort, message.content), reply_to=message)


def _open(message: Message, context: Context) -> tuple[Session, list[str]]:
    """The process's session and the cohort; a node that belongs to one client serves no other."""
    record = message.content.config_records["round"]
    session = open_session(cast(str, record["config"]))
    cohort = list(cast(list[str], record["clients"]))
    own = context.node_config.get("client")
    if own is not None and message.metadata.message_type.startswith("query"):
        cohort = [str(own)]
    if own is not None and cohort != [own]:
        raise FedlabError(f"this node belongs to {own}; it was asked to act for {', '.join(cohort)}")
    return session, cohort
