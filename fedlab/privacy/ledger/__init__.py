"""Signed, chained ledgers: what a client was charged before its data was touched, and the server's mirror of it."""
