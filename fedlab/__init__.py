"""fedlab: private federated fine-tuning of language models.

``fedlab.simulate(config)`` runs a simulation; the command line does the same (``fedlab simulate CONFIG.toml``).
"""

from __future__ import annotations

from fedlab.config import RunConfig
from fedlab.errors import ConfigError, FedlabError, Interrupted, PrivacyError, RunFailed
from fedlab.run.launch import Run, resume, simulate
from fedlab.run.launch.sweep import sweep
from fedlab.version import VERSION

__version__ = VERSION

__all__ = [
    "ConfigError",
    "FedlabError",
    "Interrupted",
    "PrivacyError",
    "Run",
    "RunConfig",
    "RunFailed",
    "resume",
    "simulate",
    "sweep",
]
