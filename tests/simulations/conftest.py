"""Benchmarks are scripts: their siblings are found in the script's own folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "simulations" / "benchmarks"))
