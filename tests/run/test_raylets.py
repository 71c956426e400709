"""A Ray cluster of several machines, here two raylets on one, gives the bits of a run in one process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedlab
from fedlab.config import RunConfig


@pytest.fixture
def cluster() -> Iterator[str]:
    """Address of a cluster of two raylets with one processor each."""
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        found.add_node(num_cpus=1)
        found.wait_for_nodes(60)
        yield found.address
    finally:
        found.shutdown()


@pytest.mark.slow
def test_two_raylets_give_the_same_bits_as_one_process(cluster: str, tiny_toml: str, tmp_path: Path):
    (tmp_path / "tiny.toml").write_text(tiny_toml)
    settings = ["run.backend=ray", "run.nodes=2", f"run.ray_address={cluster}", "run.rounds=2"]
    command = [
        sys.executable,
        "-m",
        "fedlab.cli",
        "simulate",
        str(tmp_path / "tiny.toml"),
        "--out",
        str(tmp_path / "run"),
        "--quiet",
    ]
    done = subprocess.run(
        [*command, *(text for value in settings for text in ("--set", value))],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    alone = fedlab.simulate(RunConfig.parse(tiny_toml, ["run.rounds=2"]), tmp_path / "alone", quiet=True)
    assert found["adapter_digest"] == alone.result["adapter_digest"]
