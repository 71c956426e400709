"""One message of evaluation: the global model, with what a client keeps of it for itself, on each client's own held-out
examples.
"""

from __future__ import annotations

import time
from typing import cast

from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict

from clients.train import personal_directory, received_state
from fedlab.evaluate import primary_score
from fedlab.run.personal import load_personal
from fedlab.session import Session


def evaluate_cohort(session: Session, cohort: list[str], content: RecordDict, context: Context) -> RecordDict:
    """Reply to an evaluate message: per-client lists ``score``, the primary one, and ``examples``, held out."""
    started = time.time()
    order = content.config_records["round"]
    state = received_state(content, cast(str, order["wire_dtype"])) | session.basis
    home, model, data = personal_directory(order, context), session.model, session.data
    scored = []
    session.model.load(state)
    for client in cohort:
        if order["keep"]:
            session.model.load(state | load_personal(home, client, cast(int, order["round"]) + 1))
        scored.append(primary_score(model, data, data.local_test(client), session.config))
    return RecordDict(
        {
            "clients": ConfigRecord({"ids": cohort}),
            "metrics": MetricRecord(
                {
                    "score": scored,
                    "examples": [len(data.local_test(client)) for client in cohort],
                    "started": started,
                    "ended": time.time(),
                }
            ),
        }
    )
