"""One message of evaluation: the global model, with what a client keeps of it for itself, on each client's own held-out
examples.
"""

from __future__ import annotations

import time
from typing import cast

from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict

from clients.train import personal_directory, received_state
from fedlab.evaluate.classification import classify
from fedlab.run.personal import load_personal
from fedlab.session import Session


def evaluate_cohort(session: Session, cohort: list[str], content: RecordDict, context: Context) -> RecordDict:
    """Reply to an evaluate message: per-client lists ``accuracy`` and ``examples`` (of the held-out part, never trained
    on).
    """
    started = time.time()
    order = content.config_records["round"]
    state = received_state(content, cast(str, order["wire_dtype"])) | session.basis
    batch_size, home = session.config.evaluate.batch_size, personal_directory(order, context)
    scored = []
    session.model.load(state)
    for client in cohort:
        if order["keep"]:
            session.model.load(state | load_personal(home, client, cast(int, order["round"]) + 1))
        scored.append(classify(session.model, session.data, session.data.local_test(client), batch_size))
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
