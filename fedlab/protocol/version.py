"""Whether both ends of a run are the same version of fedlab: they sign plans and account for rounds with one code."""

from __future__ import annotations

import json

from fedlab.protocol.wire import Frame, ProtocolError
from fedlab.version import VERSION


class OtherVersion(ProtocolError):
    """The other end runs another version of fedlab."""

    code = "version"


def check_version(frame: Frame) -> None:
    """Look at the version in a request, before it is parsed: another version may have other fields.

    Raises OtherVersion where it names another one; a request without one is the parser's matter.
    """
    try:
        told = json.loads(frame.header).get("version", VERSION)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return
    if told != VERSION:
        raise OtherVersion(
            "version", f"the server runs fedlab {str(told)[:40]!r}, and this is {VERSION}; install the same on both"
        )
