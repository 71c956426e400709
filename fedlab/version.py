"""The version of this package, for what must not import the rest of it."""

VERSION = "0.1.0"
