"""What is said where clients are on machines of their own: a run's own words, and what a client's check prints."""

from __future__ import annotations

from pathlib import Path

from clients.check import about
from fedlab.config import RunConfig
from fedlab.config.client import ClientFile
from fedlab.privacy.ledger.keys import load_or_create_key, public_hex
from fedlab.privacy.promise import MASKED, UNMASKED, trust
from fedlab.run.launch import prepared_to_deploy

SHARED = (
    "privacy.survivors=2", "train.steps=1", "train.sampling_rate=0.2", "train.momentum=0", "privacy.noise=secure",
    "objective.labels=['fruit', 'metal', 'ocean']",
)  # fmt: skip
FILE = """
[client]
id = "north"
[data]
path = "records.csv"
text = "t"
label = "l"
[models.m]
[policy]
max_epsilon = 1.0
shared_noise = {allowed}
[budget]
epsilon = 2.0
"""


def test_a_deployed_run_says_that_it_masks_whatever_was_asked(tiny_toml: str):
    asked = RunConfig.parse(tiny_toml, SHARED)
    deployed = prepared_to_deploy(asked)
    assert (asked.privacy.masked, deployed.privacy.masked) == (False, True)
    assert UNMASKED in trust(asked)
    assert MASKED in trust(deployed)
    alone = RunConfig.parse(tiny_toml, ["objective.labels=['fruit', 'metal', 'ocean']", "privacy.noise=secure"])
    assert not prepared_to_deploy(alone).privacy.masked


def test_a_clients_check_prints_the_identity_that_its_peers_need(tmp_path: Path):
    file = ClientFile.parse(FILE.format(allowed="true"), tmp_path)
    said = "\n".join(about(file))
    key = load_or_create_key(tmp_path / "north" / "ledger" / "keys" / "north.pem")
    assert f'north = "{public_hex(key)}"' in said
    assert "roster: nobody" in said


def test_without_shared_noise_a_check_makes_no_key(tmp_path: Path):
    assert "identity" not in "\n".join(about(ClientFile.parse(FILE.format(allowed="false"), tmp_path)))
    assert not (tmp_path / "north").exists()
