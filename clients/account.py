"""A client's account in one run: its ledger, the plan that it signed, and the releases that it charged for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from typing import Any

from clients.kept import Kept, forgotten, kept_path, load
from clients.owner import Owner
from fedlab.lora.state import part_of
from fedlab.privacy.ledger.guard import Guard, Refusal, budget_terms, run_terms, scope_of
from fedlab.privacy.ledger.keys import keyed_hash
from fedlab.privacy.ledger.ledger import lines_after
from fedlab.privacy.release import public_names
from fedlab.protocol.messages import RunReference
from fedlab.session import Session

PACKAGES = ("fedlab", "torch", "dp-accounting", "opacus", "cryptography")
