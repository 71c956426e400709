"""Keys of masked sums: used once, and for one set of clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.node import Node
from clients.owner import SimulatedOwners
from clients.sum_keys import answer_keys, hide, key_file
from fedlab.config import RunConfig
from fedlab.errors import PrivacyError
from fedlab.protocol.fields import RunReference
from fedlab.protocol.messages import KeysRequest

RUN = RunReference("a" * 32, "b" * 64, ("head",))
NAMES = ("client-0", "client-1", "client-2", "client-3")
VALUES = {"x": np.zeros(4, np.int64)}


@pytest.fixture
def node(tiny_toml: str, tmp_path: Path, helpers: Any) -> Node:
    config = RunConfig.parse(tiny_toml, ["privacy={unit='none'}"])
    return Node(config, SimulatedOwners(config, helpers.places_at(tmp_path)), lambda: None)  # type: ignore[arg-type,return-value]


def test_a_client_refuses_a_masked_sum_over_others(node: Node):
    owner = node.owners.one("client-0")
    for attempt, peers in enumerate((NAMES, NAMES, NAMES[:3])):
        keys = answer_keys(node, KeysRequest(RUN, NAMES)).keys
        asked = {name: keys[name] for name in peers}
        if attempt < 2:
            assert (hide(owner, VALUES, RUN.run, attempt, asked, 3)["x"] != 0).any()
        else:
            with pytest.raises(PrivacyError, match="sum over other clients before"):
                hide(owner, VALUES, RUN.run, attempt, asked, 3)
        assert not key_file(owner, RUN.run).exists()


def test_a_key_is_used_once_and_lies_where_only_its_owner_reads(node: Node):
    owner = node.owners.one("client-0")
    keys = answer_keys(node, KeysRequest(RUN, NAMES)).keys
    assert key_file(owner, RUN.run).stat().st_mode & 0o777 == 0o600
    hide(owner, VALUES, RUN.run, 0, keys, 3)
    with pytest.raises(PrivacyError, match="no key for this sum"):
        hide(owner, VALUES, RUN.run, 0, keys, 3)
