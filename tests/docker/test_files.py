"""What ``docker/`` says, without an engine: who may reach and read what, which versions, and that its files fit
together.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions, requires
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
UIDS = {"server": "10001", "trainer": "10001", "transport": "10002"}
COMPOSE = [path.name for path in sorted(DOCKER.glob("*compose.yaml"))]


def script(name: str) -> ModuleType:
    """A file of ``docker/``, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCKER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def services(file: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((DOCKER / file).read_text(encoding="utf-8"))["services"]
    return found


def target(service: dict[str, Any]) -> str:
    return service["image"].rpartition("-")[2]


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Where a service has what: place → ``ro`` or ``rw``."""
    found = {}
    for line in service.get("volumes", []):
        plain = re.sub(r"\$\{[^}]*\}", "X", line).split(":")
        found[plain[1]] = plain[2] if len(plain) > 2 else "rw"
    return found


ALL = [
    pytest.param(file, name, service, id=f"{file}:{name}")
    for file in ("compose.yaml", "client.compose.yaml")
    for name, service in services(file).items()
]


@pytest.mark.parametrize(("file", "name", "service"), ALL)
def test_every_container_is_confined(file: str, name: str, service: dict[str, Any]):
    uid = UIDS[target(service)]
    assert service["user"] == f"{uid}:{uid}"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["ulimits"]["core"] == 0
    assert not {"privileged", "cap_add", "devices", "pid", "ipc", "ports", "environment", "env_file"} & service.keys()
    assert "docker.sock" not in str(service)
    assert [place for place, mode in mounts(service).items() if mode == "rw"] == [
        place for place in ("/var/lib/fedlab", "/run/fedlab") if place in mounts(service)
    ]


@pytest.mark.parametrize(("file", "name", "service"), ALL)
def test_data_or_a_network_but_never_both(file: str, name: str, service: dict[str, Any]):
    places = mounts(service)
    match target(service):
        case "trainer":
            assert service["network_mode"] == "none"
            assert "networks" not in service
            assert "secrets" not in service
            assert places["/data"] == "ro"
        case "transport":
            assert set(places) == {"/config/client.toml", "/run/fedlab"}
            assert {secret["target"] for secret in service["secrets"]} == {
                "/run/secrets/ca.crt",
                "/run/secrets/node.key",
            }
            assert "network_mode" not in service


def test_hospitals_share_a_network_with_the_server_alone():
    file = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    assert all(network["internal"] for network in file["networks"].values())
    for name in file["networks"]:
        there = {service for service, found in file["services"].items() if name in found.get("networks", [])}
        assert there == {"server", f"{name}-transport"}


def test_the_authoritys_key_is_in_no_container():
    for file in COMPOSE:
        assert "ca.key}" not in (DOCKER / file).read_text(encoding="utf-8")
        assert "ca.key" not in (yaml.safe_load((DOCKER / file).read_text(encoding="utf-8")).get("secrets") or {})


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
@pytest.mark.parametrize(
    "files", [["compose.yaml"], ["compose.yaml", "publish.compose.yaml"], ["client.compose.yaml"]], ids="+".join
)
def test_compose_accepts_the_files(files: list[str]):
    chosen = [word for file in files for word in ("-f", str(DOCKER / file))]
    places = {"PATH": os.environ["PATH"], "FEDLAB_CLIENT": "/srv/fedlab", "FEDLAB_DATA": "/srv/records"}
    done = subprocess.run(["docker-compose", *chosen, "config", "-q"], env=places, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_image_is_of_nobody_in_particular_and_asks_after_itself():
    stages = re.split(r"^FROM ", (DOCKER / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for name, uid in UIDS.items():
        (stage,) = [text for text in stages if re.match(rf"base AS {name}\n", text)]
        assert f"\nUSER {uid}:{uid}\n" in stage
        assert "\nHEALTHCHECK " in stage
        assert "RUN " not in stage.partition("USER ")[2]


def test_versions_are_those_of_the_lock():
    """Neither the Dockerfile nor the transport's list has one of its own, and pip is never asked without the lock."""
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n", "", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    for command in re.findall(r"/pip (?:install|wheel) [^&\n]*", lines):
        assert re.search(
            r"-c requirements\.lock|--no-index|--no-build-isolation -w|grep '\^torch==' requirements\.lock", command
        ), command
    assert re.findall(r"[a-z]==\d", text) == []
    pinned = script("locked").pins((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    assert {script("locked").canonical(name) for name in light()} <= pinned.keys()


def light() -> list[str]:
    """The names in ``transport.txt``."""
    lines = (DOCKER / "transport.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"#.*|[a-z0-9-]+", line) for line in lines)
    return [line for line in lines if not line.startswith("#")]


def test_what_is_not_in_the_lock_fails_a_build():
    strangers = script("locked").strangers
    pinned = {"torch": "2.13.0", "dm-tree": "0.1.10"}
    assert strangers({"torch": "2.13.0+cpu", "dm-tree": "0.1.10", "fedlab": "0.1.0", "pip": "23"}, pinned) == []
    assert strangers({"nvidia-cublas": "13.1", "triton": "3.7"}, pinned) == []
    assert strangers({"torch": "2.12.0"}, pinned) == ["torch 2.12.0: the lock says 2.13.0"]
    assert strangers({"left-pad": "1.0"}, pinned) == ["left-pad 1.0: the lock says nothing"]


def closure(names: list[str]) -> set[str]:
    """Distributions that come with these, by the metadata of what is installed here."""
    found: set[str] = set()
    todo = [Requirement(name) for name in names]
    while todo:
        wanted = todo.pop()
        name = script("locked").canonical(wanted.name)
        key = f"{name}[{','.join(sorted(wanted.extras))}]"
        if key in found:
            continue
        found |= {name, key}
        for line in requires(name) or []:
            needed = Requirement(line)
            extras = wanted.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    return found


def test_the_transport_imports_nothing_that_its_image_lacks():
    """The transport's modules are imported where only what ``transport.txt`` brings can be."""
    there, canonical = closure(light()), script("locked").canonical
    absent = {
        module
        for module, names in packages_distributions().items()
        if not {canonical(name) for name in names} & (there | {"fedlab"})
    }
    assert {"torch", "transformers", "ray", "datasets"} <= absent
    assert distribution("flwr").version
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import fedlab.cli, fedlab.run.launch.deploy.carrier, fedlab.run.launch.deploy.client
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_source_goes_to_the_engine():
    lines = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert lines[1] == "*"
    assert all((ROOT / line[1:]).exists() for line in lines if line.startswith("!"))


def test_health_checks(tmp_path: Path):
    problem = script("health").problem
    path = tmp_path / "trainer.sock"
    with socket.socket(socket.AF_UNIX) as trainer:
        trainer.bind(str(path))
        assert problem(f"listens:{path}") == f"nobody listens at {path}"
        trainer.listen()
        assert problem(f"listens:{path}") is None
    assert problem(f"process:{Path(sys.executable).name}") is None
    assert problem("process:flower-supernode-of-nobody") == "flower-supernode-of-nobody does not run"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert "refused" in (problem(f"https://127.0.0.1:{taken.getsockname()[1]}/health") or "")


def test_docker_is_no_package():
    assert not list(DOCKER.rglob("__init__.py"))


def test_the_example_is_what_fedlab_reads():
    from fedlab.config import RunConfig
    from fedlab.config.client import ClientFile
    from fedlab.config.server import ServerFile

    server = ServerFile.load(DOCKER / "example/server.toml")
    run = RunConfig.load(DOCKER / "example/run.toml")
    for name in ("north", "south"):
        client = ClientFile.load(DOCKER / f"example/{name}.toml")
        assert client.client.id == name
        assert client.client.server == f"server:{server.server.port}"
        assert client.client.transport_user == UIDS["transport"]
        assert str(client.socket) == "/run/fedlab/trainer.sock"
        assert run.model.name in client.models
        assert client.policy.max_epsilon is not None
        assert run.privacy.epsilon is not None
        assert run.privacy.epsilon <= client.policy.max_epsilon
    assert run.data.clients == 2
