"""Environment variables of runs and of the programs that they start."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

# Set before flwr or ray is imported: no telemetry, no update check, no installing at run time.
QUIET_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a late call after shutdown must not start a second Ray
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
# What a program of Flower's gets of this process's environment: tokens and passwords that lie there stay here.
PASSED_ON = (
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "LOGNAME",
    "PYTHONPATH",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TMPDIR",
    "TZ",
    "USER",
    "VIRTUAL_ENV",
    "HTTPS_PROXY",
    "https_proxy",
)
LOOPBACK = "localhost,127.0.0.1,::1"  # no proxy is asked for what is on this machine


def flower_environment(home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The whole environment of one of Flower's programs.

    Args:
        home: its ``FLWR_HOME``; two programs on one machine need two.
        more: further variables.
    """
    found = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found |= {"PATH": path, "FLWR_HOME": str(home), "PYTHONUNBUFFERED": "1", **QUIET_ENVIRONMENT}
    return found | without_proxy(os.environ) | dict(more or {})


def without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """``NO_PROXY`` with this machine in it."""
    given = environment.get("NO_PROXY") or environment.get("no_proxy") or ""
    told = ",".join(filter(None, [given, LOOPBACK]))
    return {"NO_PROXY": told, "no_proxy": told}
