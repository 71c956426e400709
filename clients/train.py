"""One message of training: each client of the cohort in turn, on the process's one model."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict

from clients.custody import Custody
from fedlab.errors import FedlabError, PrivacyError
from fedlab.lora.ranks import widen
from fedlab.lora.state import State, digest, from_wire, select, to_wire
from fedlab.personal import load_personal, save_personal
from fedlab.privacy.guard import Refusal, public_reason
from fedlab.privacy.plan import DPPlan
from fedlab.session import Session
from fedlab.train.trainer import Trained, train_client

logger = logging.getLogger("fedlab")


def train_cohort(session: Session, cohort: list[str], content: RecordDict, context: Context) -> RecordDict:
    """Reply to a train message: ``updates`` (per client and name), ``metrics`` (per-client lists), ``charges``, ``failures``.

    Under DP a charge is signed and on the disk before the client's data is touched, and the update is committed before it leaves.
    """
    started = time.time()
    order = content.config_records["round"]
    wire_dtype = cast(str, order["wire_dtype"])
    state = received_state(content, wire_dtype)
    updates: dict[str, Array] = {}
    results: dict[str, Trained] = {}
    failures: dict[str, str] = {}
    refused: list[str] = []
    lines: dict[str, str] = {}
    exhausted: list[str] = []
    home = personal_directory(order, context)
    guarded = session.config.private and session.config.privacy.unit == "example"
    for client, known, rank in zip(cohort, cast(list[int], order["known"]), cast(list[int], order["ranks"]), strict=True):
        custody: Custody | None = None
        try:
            custody = Custody(session, client, order, context) if guarded else None
            results[client], wire = _train(session, client, state, order, rank, home, custody)
            updates |= {f"{client}/{name}": Array(value) for name, value in wire.items()}
            if custody and custody.exhausted(cast(int, order["round"]) + 1):
                exhausted.append(client)
        except Refusal as refusal:
            failures[client] = str(refusal)
            refused.append(client)
        except (FedlabError, RuntimeError, ValueError) as error:
            logger.warning("%s failed in round %d: %s", client, order["round"], error)
            failures[client] = public_reason(error) if guarded else f"{type(error).__name__}: {error}"
        try:
            if custody:
                lines[client] = custody.lines_after(known)
        except PrivacyError as error:
            failures.setdefault(client, str(error))
    hide = session.config.private and not session.config.privacy.share_metrics
    return RecordDict(
        {
            "updates": ArrayRecord(updates),
            "clients": ConfigRecord({"ids": list(results)}),
            "metrics": MetricRecord(
                {
                    "examples": [r.examples for r in results.values()],
                    "steps": [r.steps for r in results.values()],
                    "loss": [math.nan if hide else r.loss for r in results.values()],
                    "clip_fraction": [math.nan if hide else r.clip_fraction for r in results.values()],
                    "seconds": [r.seconds for r in results.values()],
                    "started": started,
                    "ended": time.time(),
                }
            ),
            "charges": ConfigRecord({"ids": list(lines), "lines": list(lines.values()), "exhausted": exhausted}),
            "failures": ConfigRecord({"ids": list(failures), "reasons": list(failures.values()), "refused": refused}),
        }
    )


def _train(
    session: Session, client: str, state: State, order: ConfigRecord, rank: int, home: Path, custody: Custody | None
) -> tuple[Trained, dict[str, np.ndarray]]:
    """Train one client, charged and committed under DP; the result and what goes on the wire: the update without what the client keeps."""
    number, trained, wire_dtype = cast(int, order["round"]), cast(list[str], order["trained"]), cast(str, order["wire_dtype"])
    keep = cast(list[str], order["keep"])
    if not 1 <= rank <= session.config.lora.rank:
        raise FedlabError(f"rank {rank} was asked for, outside [1, {session.config.lora.rank}]")

    def run(plan: DPPlan | None) -> tuple[Trained, dict[str, np.ndarray]]:
        start = state | (load_personal(home, client, number) if keep else {})
        lower = rank if rank < session.config.lora.rank else None
        result = train_client(session.model, session.data, client, start, trained, session.config, number, plan, rank=lower)
        if own := select(result.update, keep):
            save_personal(home, client, number, {name: start[name] + value for name, value in widen(own, start).items()})
        return result, to_wire({name: value for name, value in result.update.items() if name not in own}, wire_dtype)

    if custody is None:
        return run(None)
    custody.check_scope(trained)
    with custody.guard.charge(custody.terms, number, digest(state)) as commit:
        result, wire = run(custody.plan)
        commit(result.steps, digest(from_wire(wire, wire_dtype)))
    return result, wire


def personal_directory(order: ConfigRecord, context: Context) -> Path:
    """Where this node's clients keep what is theirs alone: as the run says, or, on a node of one client, as its owner says."""
    if "client" not in context.node_config:
        return Path(str(order["personal"]))
    return Path(str(context.node_config.get("personal", Path.home() / ".fedlab" / "personal"))) / str(order["run"])


def received_state(content: RecordDict, wire_dtype: str) -> State:
    """The global state that a message carries, in float32."""
    return from_wire({name: array.numpy() for name, array in content.array_records["state"].items()}, wire_dtype)
