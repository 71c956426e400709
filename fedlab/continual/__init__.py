"""Continual learning on constrained subspaces: what earlier tasks use stays as it is.

No flwr, ray or transformers in here.
"""
