"""Identities that a correct low-rank aggregator satisfies; ``check`` runs them on any."""

from fedlab.lora.conformance.suite import PROMISES, PROPERTIES, Finding, Report, check, markdown

__all__ = ["PROMISES", "PROPERTIES", "Finding", "Report", "check", "markdown"]
