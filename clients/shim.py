"""The ClientApp of a deployment: passes a message's bytes to the resident trainer and its answer's bytes back.

Flower starts a process for every message, and runs whatever app the server submits, so this one is not trusted with
anything: it holds no model, no data, no key, and imports nothing heavy. Where the trainer listens stands in the
environment that whoever started the transport gave it.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.pipe import receive, send

RECORD = "fedlab"  # of a message
TRAINER = "FEDLAB_TRAINER"  # environment: the trainer's socket
PATIENCE = "FEDLAB_TRAINER_PATIENCE"  # environment: seconds to wait for a trainer that is being restarted
app = ClientApp()


@app.query()
@app.train()
@app.evaluate()
def answer(message: Message, context: Context) -> Message:
    """What the trainer answers; a bare code of failure where it is not there."""
    return Message(RecordDict({RECORD: ConfigRecord(pass_on(message.content))}), reply_to=message)


def pass_on(content: RecordDict) -> dict[str, Any]:
    """The fields of the frame that the trainer answers with."""
    try:
        fields: dict[str, Any] = dict(content.config_records[RECORD])
        with _connected() as connection:
            send(connection, fields)
            return receive(connection)
    except Exception:  # its text could say what the server may not know; the trainer's log has it
        return {"kind": "node-failure", "header": b'{"code":"failed"}', "table": b"[]", "body": b""}


def _connected() -> socket.socket:
    """A connection to the trainer, which may be starting. Raises OSError when patience ends."""
    place, patience = os.environ[TRAINER], float(os.environ.get(PATIENCE, "60"))
    deadline = time.monotonic() + patience
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(place)
            return connection
        except OSError:
            connection.close()
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)
