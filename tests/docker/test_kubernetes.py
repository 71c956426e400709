"""The manifests, against Kubernetes' schema and against what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "docker/kubernetes"
VERSIONS = ("1.30", "1.35")


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


ALL = [
    pytest.param(manifest, id=f"{path.stem}-{manifest['kind']}-{manifest['metadata']['name']}")
    for path in sorted(FOLDER.glob("*.yaml"))
    for manifest in manifests(path.name)
]
PODS = [param for param in ALL if param.values[0]["kind"] in ("StatefulSet", "Deployment")]


@pytest.mark.parametrize("manifest", ALL)
def test_manifests_fit_the_schema(manifest: dict[str, Any]):
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for version in VERSIONS:
        validator.validate(manifest, version, strict=True)


@pytest.mark.parametrize("manifest", PODS)
def test_every_pod_is_confined(manifest: dict[str, Any]):
    assert manifest["spec"]["replicas"] == 1
    pod = manifest["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    own = pod["securityContext"]
    assert own["runAsNonRoot"] is True
    assert own["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert own["runAsUser"] == (10002 if container["name"] == "transport" else 10001)
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"startupProbe", "readinessProbe", "livenessProbe", "resources"} <= container.keys()
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable <= {"/tmp", "/var/lib/fedlab", "/run/fedlab"}


@pytest.mark.parametrize("manifest", PODS)
def test_every_claim_and_map_is_there(manifest: dict[str, Any]):
    name = manifest["metadata"]["namespace"]
    there = {
        (other["kind"], other["metadata"]["name"])
        for param in ALL
        for other in [param.values[0]]
        if other["metadata"].get("namespace") == name
    }
    for volume in manifest["spec"]["template"]["spec"]["volumes"]:
        if claim := volume.get("persistentVolumeClaim"):
            assert ("PersistentVolumeClaim", claim["claimName"]) in there
        if found := volume.get("configMap"):
            assert ("ConfigMap", found["name"]) in there


def test_the_trainer_has_data_and_no_network_the_transport_a_network_and_no_data():
    client = manifests("client.yaml")
    policies = {found["metadata"]["name"]: found["spec"] for found in client if found["kind"] == "NetworkPolicy"}
    pods = {
        found["metadata"]["name"]: found["spec"]["template"] for found in client if "template" in found.get("spec", {})
    }
    assert set(policies) == set(pods) == {"fedlab-trainer", "fedlab-transport"}
    for name, policy in policies.items():
        assert policy["podSelector"]["matchLabels"].items() <= pods[name]["metadata"]["labels"].items()
        assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
        assert policy["ingress"] == []
    assert policies["fedlab-trainer"]["egress"] == []
    claims = {
        name: {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in pod["spec"]["volumes"]
            if "persistentVolumeClaim" in volume
        }
        for name, pod in pods.items()
    }
    assert claims["fedlab-transport"] == {"fedlab-socket"}
    assert claims["fedlab-trainer"] == {"fedlab-socket", "fedlab-records", "fedlab-models", "fedlab-home"}
    assert not any("secret" in volume for volume in pods["fedlab-trainer"]["spec"]["volumes"])


def test_files_in_maps_are_what_fedlab_reads(tmp_path: Path):
    from fedlab.config.client import ClientFile
    from fedlab.config.server import ServerFile

    for name, kind in (("client", ClientFile), ("server", ServerFile)):
        (text,) = [
            found["data"][f"{name}.toml"]
            for found in manifests(f"{name}.yaml")
            if f"{name}.toml" in found.get("data", {})
        ]
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
        kind.load(tmp_path / f"{name}.toml")
