"""The same run simulated and deployed, over the same split: the same adapter, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.config.client import ClientFile
from fedlab.run.deployment import Deployment
from fedlab.run.launch import deploy_run

CLIENT = """
[client]
id = "{name}"
[data]
path = "{path}"
text = "note"
label = "subject"
held_out = 0.2
seed = 3
[models."{model}"]
path = "{copy}"
[policy]
noise = "seeded"
min_sigma = 0.5
{more}
[budget]
epsilon = 100.0
"""


@pytest.fixture
def sites(tiny_data: Path, tmp_path: Path) -> dict[str, Path]:
    """Site → a file of its own with its records in their order, under other names of the columns."""
    rows: dict[str, list[dict[str, str]]] = {}
    for line in tiny_data.read_text().splitlines():
        record = json.loads(line)
        rows.setdefault(record["site"], []).append({"note": record["text"], "subject": record["topic"]})
    found = {}
    for site, own in rows.items():
        found[site] = tmp_path / f"{site}.jsonl"
        found[site].write_text("".join(json.dumps(row) + "\n" for row in own))
    return found


@pytest.mark.parametrize("overrides", [(), ("strategy.name=rolora",), ("privacy={unit='none'}",)], ids=str)
def test_a_deployed_run_gives_the_simulated_ones_adapter_to_the_bit(
    overrides: tuple[str, ...], tiny_toml: str, tiny_bert: Path, sites: dict[str, Path], tmp_path: Path, carried: Any
):
    import shutil

    copy = tmp_path / "elsewhere" / "model"
    shutil.copytree(tiny_bert, copy)
    split = ["data.partition={kind='natural', column='site'}", f"data.clients={len(sites)}", "run.cohort=1"]
    config = RunConfig.parse(tiny_toml, ["objective.labels=['fruit', 'metal', 'ocean']", *split, *overrides])
    simulated = fedlab.simulate(config, tmp_path / "simulated", quiet=True)
    every = '["size", "timing", "failure", "update", "training-metrics", "scores"]'
    more = "" if config.private else f'unit = "none"\nreleases = {every}'
    more += '\ntrained = ["lora_A", "lora_B", "head"]'
    files = [
        ClientFile.parse(CLIENT.format(name=site, path=path, model=tiny_bert, copy=copy, more=more), tmp_path)
        for site, path in sorted(sites.items(), reverse=True)
    ]
    deployment = Deployment(server="here", wait=0.0, rehearsal=True)
    deployed = deploy_run(config, deployment, tmp_path / "deployed", quiet=True, backend=carried(files))
    assert deployed.result["adapter_digest"] == simulated.result["adapter_digest"]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (deployed.path / "adapter" / name).read_bytes() == (simulated.path / "adapter" / name).read_bytes()
    for site in sites:
        assert deployed.result["clients"][site]["epsilon"] == simulated.result["clients"][site]["epsilon"]
    statement = (deployed.path / "PRIVACY.md").read_text()
    assert ("Whoever knows the seed" in statement or "run.seed" in statement) or not config.private
