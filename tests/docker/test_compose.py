"""The images and ``docker/compose.yaml`` for real: built, started, three rounds over TLS, and what each container can
reach and read.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
PREFIX = "localhost/fedlab-test"
TARGETS = ("server", "trainer", "transport")
HOSPITALS = ("north", "south")
RUN = "/var/lib/fedlab/runs/test"
Compose = Callable[..., str]


@pytest.fixture(scope="module")
def images(engine: Any) -> Iterator[dict[str, str]]:
    """The three images by target, built from this checkout."""
    names = {target: f"{PREFIX}-{target}" for target in TARGETS}
    arguments = [word for name, value in engine.build.items() for word in ("--build-arg", f"{name}={value}")]
    for target, name in names.items():
        engine.run("build", *arguments, "--target", target, "-f", DOCKER / "Dockerfile", "-t", name, ROOT, timeout=1500)
    yield names
    engine.run("image", "rm", "-f", *names.values(), check=False)


@pytest.fixture(scope="module")
def made(engine: Any, images: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys, records and a model, as ``example/make.sh`` makes them."""
    folder = tmp_path_factory.mktemp("made")
    variables = os.environ | engine.environment | {"FEDLAB_IMAGE": PREFIX}
    subprocess.run(["sh", DOCKER / "example/make.sh", folder], env=variables, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def port() -> int:
    """A free one, to publish the server at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def compose(engine: Any, made: Path, port: int) -> Iterator[Compose]:
    """The example, started and open to clients from elsewhere; a function that runs compose in it."""
    files = [DOCKER / "compose.yaml", DOCKER / "publish.compose.yaml"]
    variables = {
        "FEDLAB_IMAGE": PREFIX,
        "FEDLAB_MADE": str(made),
        "FEDLAB_PUBLISH": str(port),
        "COMPOSE_PROJECT_NAME": f"fedlab{uuid4().hex[:8]}",
    }

    def command(*words: object) -> str:
        found: str = engine.compose_run(files, variables, *words)
        return found

    try:
        command("up", "-d", "--no-build")
        yield command
    finally:
        try:
            print(command("logs", "--no-color", "--tail", 100))
        finally:
            command("down", "-v", "-t", 5)


def python(compose: Compose, service: str, code: str) -> str:
    """What a piece of Python prints inside a service's container."""
    return compose("exec", "-T", service, "python", "-c", code).strip()


def test_images_run_as_nobody_in_particular_and_can_install_nothing(engine: Any, images: dict[str, str]):
    for target, name in images.items():
        uid = "10002" if target == "transport" else "10001"
        assert engine.run("image", "inspect", "-f", "{{.Config.User}}", name).strip() == f"{uid}:{uid}"
        bare = ("run", "--rm", "--network", "none", "--read-only", "--entrypoint", "sh", name, "-c")
        assert engine.run(*bare, "id -u").strip() == uid
        assert engine.run(*bare, "ls /opt/venv/bin | grep -E '^(pip|uv$|uvx)' || echo none").strip() == "none"
        history = engine.run("history", "--no-trunc", name)
        assert "PIP_INDEX_URL" not in history


def test_the_transport_has_no_torch(engine: Any, images: dict[str, str]):
    code = (
        "import importlib.util as u; print([n for n in ('torch', 'transformers', 'ray', 'datasets') if u.find_spec(n)])"
    )
    bare = ("run", "--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp", "--entrypoint", "python")
    assert engine.run(*bare, images["transport"], "-c", code).strip() == "[]"
    assert "transport" in engine.run(*bare[:-2], images["transport"], "client", "--help")


def test_a_trainer_has_data_and_no_network(compose: Compose):
    for name in HOSPITALS:
        links = python(compose, f"{name}-trainer", "import os; print(sorted(os.listdir('/sys/class/net')))")
        assert set(json.loads(links.replace("'", '"'))) <= {"lo", "tunl0", "sit0", "ip6tnl0", "ip6_vti0", "ip_vti0"}
        assert (
            python(compose, f"{name}-trainer", "print(open('/proc/net/route').read().count('\\n'))") == "1"
        )  # the header
        assert int(python(compose, f"{name}-trainer", "print(len(open('/data/records.csv').readlines()))")) == 241
        assert "OSError" in python(
            compose, f"{name}-trainer", "try: open('/data/new', 'w')\nexcept OSError: print('OSError')"
        )


def test_a_transport_has_a_network_and_no_data(compose: Compose):
    look = (
        "import os\n"
        "places = ('/data', '/models', '/run/fedlab', '/var/lib/fedlab/north/ledger', '/var/lib/fedlab/south/ledger')\n"
        "print([place for place in places if os.access(place, os.R_OK) and os.listdir(place)])"
    )
    for name, other in (HOSPITALS, HOSPITALS[::-1]):
        transport = f"{name}-transport"
        assert python(compose, transport, look) == "[]"
        assert python(compose, transport, tries("server", 8443)) == "reached"
        for host, port in (("server", 8444), ("server", 9464), (f"{other}-transport", 8443), ("192.0.2.1", 443)):
            assert python(compose, transport, tries(host, port)) != "reached", f"{host}:{port}"


def tries(host: str, port: int) -> str:
    """Python that says whether a port can be reached."""
    return (
        f"import socket\ntry: socket.create_connection(('{host}', {port}), 3); print('reached')\n"
        "except OSError as error: print(type(error).__name__)"
    )


def test_no_container_has_rights(compose: Compose):
    code = (
        "rows = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print({name: rows[name].strip() for name in ('CapEff', 'CapBnd', 'NoNewPrivs')})"
    )
    for service in ("server", "north-trainer", "north-transport"):
        assert python(compose, service, code) == str(
            {"CapEff": "0000000000000000", "CapBnd": "0000000000000000", "NoNewPrivs": "1"}
        )
        assert "OSError" in python(compose, service, "try: open('/opt/new', 'w')\nexcept OSError: print('OSError')")


def test_nodes_reach_the_fleet_and_nothing_else(compose: Compose):
    """Over TLS that is verified, by the name in the certificate."""
    code = """
import ssl, urllib.error, urllib.request as u
context = ssl.create_default_context(cafile="/run/secrets/ca.crt")
for path in ("/health", "/v1/control/list-runs", "/v1/runtime/acquire-task"):
    try: print(u.urlopen("https://server:8443" + path, data=None if path == "/health" else b"", context=context).status)
    except urllib.error.HTTPError as error: print(error.code)
"""
    assert python(compose, "north-transport", code).split() == ["200", "404", "404"]


def test_three_rounds_of_two_hospitals(compose: Compose):
    """A run, its adapter, its audit; and what was spent outlives the containers."""
    compose("run", "--rm", "-T", "run", "run", "/config/run.toml", "--server", "/config/server.toml", "--out", RUN)
    result = json.loads(compose("exec", "-T", "server", "cat", f"{RUN}/result.json"))
    wanted = tomllib.loads((DOCKER / "example/run.toml").read_text(encoding="utf-8"))
    assert result["status"] == "completed", result
    assert result["rounds"] == wanted["run"]["rounds"]
    assert set(result["clients"]) == set(HOSPITALS)
    assert 0 < result["epsilon"] <= wanted["privacy"]["epsilon"]
    assert "CONSISTENT" in compose("exec", "-T", "server", "fedlab", "audit", RUN)
    assert "adapter_model.safetensors" in compose("exec", "-T", "server", "ls", f"{RUN}/adapter")
    spent = ("exec", "-T", "north-trainer", "sha256sum", "/var/lib/fedlab/north/ledger/north.jsonl")
    before = compose(*spent)
    compose("up", "-d", "--no-build", "--force-recreate", "north-trainer")
    assert compose(*spent) == before
    left = figure(compose, "north-transport", "fedlab_client_left_epsilon", lambda value: value < 12)
    assert left == pytest.approx(12 - result["epsilon"], abs=0.1)


def figure(compose: Compose, service: str, name: str, wanted: Callable[[float], bool]) -> float:
    """A figure of a service's endpoint, once it is there and as wanted."""
    code = f"""
import urllib.request as u
try: text = u.urlopen("http://127.0.0.1:9464/metrics").read().decode()
except OSError: text = ""
print(*[line.split()[1] for line in text.splitlines() if line.startswith("{name} ")])
"""
    deadline = time.monotonic() + 300
    while not (told := python(compose, service, code)) or not wanted(float(told)):
        assert time.monotonic() < deadline, f"{name} of {service}: {told or 'not there'}"
        time.sleep(2)
    return float(told)


def test_a_hospital_joins_from_elsewhere(engine: Any, compose: Compose, made: Path, port: int, tmp_path: Path):
    """By ``client.compose.yaml`` and the server's published port, while the server runs."""
    folder = made / "elsewhere"
    text = (DOCKER / "example/north.toml").read_text(encoding="utf-8").replace("north", "west")
    text = text.replace('path = "/models/tiny"', 'path = "/models/model"').replace("server:8443", f"server:{port}")
    (tmp_path / "client.toml").write_text(text, encoding="utf-8")
    (tmp_path / "client.toml").chmod(0o644)
    steps = """set -e
fedlab keys node west --out /made/elsewhere
fedlab keys add /made/keys /made/elsewhere/west.pub
chown 10001:10001 /made/keys/nodes/west.pub
cp -rp /made/model /made/keys/ca.crt /made/elsewhere
cp /client.toml /made/elsewhere
mv /made/elsewhere/west.key /made/elsewhere/node.key
chown 10002:10002 /made/elsewhere/node.key
"""
    given = ("-v", f"{made}:/made", "-v", f"{tmp_path}/client.toml:/client.toml:ro", "--entrypoint", "sh")
    engine.run("run", "--rm", "--network", "none", "--user", "0:0", *given, f"{PREFIX}-server", "-c", steps)
    override = tmp_path / "names.yaml"  # in earnest the name is one of DNS
    override.write_text('services: {transport: {extra_hosts: ["server:host-gateway"]}}\n')
    files = [DOCKER / "client.compose.yaml", override]
    variables = {
        "FEDLAB_IMAGE": PREFIX,
        "FEDLAB_CLIENT": str(folder),
        "FEDLAB_DATA": str(made / "data/north"),
        "COMPOSE_PROJECT_NAME": f"west{uuid4().hex[:8]}",
    }
    try:
        engine.compose_run(files, variables, "up", "-d", "--no-build")
        assert figure(compose, "server", "fedlab_server_nodes_live", lambda value: value == 3) == 3
    finally:
        try:
            print(engine.compose_run(files, variables, "logs", "--no-color", "--tail", 100))
        finally:
            engine.compose_run(files, variables, "down", "-v", "-t", 5)
