"""Real machines: keys, the server's processes, and a run that is submitted to it.

``keys`` and ``certificates`` (who is who), ``reach`` (what a server answers with, in words), ``processes`` (children
that are watched), ``superlink`` and ``front`` (what the server consists of), ``server`` (both, supervised), ``submit``
(a run on it).
"""
