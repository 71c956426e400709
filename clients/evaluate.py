"""One message of evaluation: the global model on each client's own held-out examples."""

from __future__ import annotations

import time
from typing import cast

from flwr.app import ConfigRecord, MetricRecord, RecordDict

from clients.train import received_state
from fedlab.evaluate.classification import classify
from fedlab.session import Session


def evaluate_cohort(session: Session, cohort: list[str], content: RecordDict) -> RecordDict:
    """Reply to an evaluate message: per-client lists ``accuracy`` and ``examples`` (of the held-out part, never trained on)."""
    started = time.time()
    order = content.config_records["round"]
    session.model.load(received_state(content, cast(str, order["wire_dtype"])))
    batch_size = session.config.evaluate.batch_size
    scored = [classify(session.model, session.data, session.data.local_test(client), batch_size) for client in cohort]
    return RecordDict(
        {
            "clients": ConfigRecord({"ids": cohort}),
            "metrics": MetricRecord(
                {
                    "accuracy": [s.accuracy for s in scored],
                    "examples": [s.examples for s in scored],
                    "started": started,
                    "ended": time.time(),
                }
            ),
        }
    )
