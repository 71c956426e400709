"""One message of training: each client of the cohort in turn, on the process's one model."""

from __future__ import annotations

import logging
import math
import time
from typing import cast

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlab.errors import FedlabError
from fedlab.lora.state import State, from_wire, to_wire
from fedlab.session import Session
from fedlab.train.trainer import Trained, train_client

logger = logging.getLogger("fedlab")


def train_cohort(session: Session, cohort: list[str], content: RecordDict) -> RecordDict:
    """Reply to a train message: ``updates`` (per client and name), ``metrics`` (per-client lists), ``charges``, ``failures``.

    A charge is entered before the client's data is touched, so a client that breaks half-way is charged in full.
    """
    started = time.time()
    order = content.config_records["round"]
    round_number, trained = cast(int, order["round"]), cast(list[str], order["trained"])
    wire_dtype = cast(str, order["wire_dtype"])
    state = received_state(content, wire_dtype)
    updates: dict[str, Array] = {}
    results: dict[str, Trained] = {}
    failures: dict[str, str] = {}
    charged: dict[str, tuple[str, float, float, int]] = {}
    for client in cohort:
        try:
            plan = session.plan(client)
            if plan is not None:
                event = plan.event()
                charged[client] = (event.sampler, event.q, event.sigma, event.steps)
            result = train_client(session.model, session.data, client, state, trained, session.config, round_number, plan)
        except (FedlabError, RuntimeError, ValueError) as error:
            logger.warning("%s failed in round %d: %s", client, round_number, error)
            failures[client] = f"{type(error).__name__}: {error}"
            continue
        results[client] = result
        updates |= {f"{client}/{name}": Array(value) for name, value in to_wire(result.update, wire_dtype).items()}
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
            "charges": ConfigRecord(
                {
                    "ids": list(charged),
                    "sampler": [c[0] for c in charged.values()],
                    "q": [c[1] for c in charged.values()],
                    "sigma": [c[2] for c in charged.values()],
                    "steps": [c[3] for c in charged.values()],
                }
            ),
            "failures": ConfigRecord({"ids": list(failures), "reasons": list(failures.values())}),
        }
    )


def received_state(content: RecordDict, wire_dtype: str) -> State:
    """The global state that a message carries, in float32."""
    return from_wire({name: array.numpy() for name, array in content.array_records["state"].items()}, wire_dtype)
