"""Every message between the server and a client: frozen dataclasses, and one bounded parser. Knows no Flower."""

from fedlab.protocol.wire import Frame, ProtocolError, decode, encode, encode_all

__all__ = ["Frame", "ProtocolError", "decode", "encode", "encode_all"]
