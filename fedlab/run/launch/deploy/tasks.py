"""Who may take a task of Flower's: whoever signs the request with the executors' secret."""

from __future__ import annotations

from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


def executor(secret: bytes) -> SuperExecAuthHttpInterceptor:
    """Signs the requests for tasks of a client of the runtime interface."""
    return SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({ACQUIRE}))
