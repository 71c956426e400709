"""A Docker engine for the tests of images: the machine's own, or one in a box of its own with everything it needs to
build offline.

``FEDLAB_TEST_DOCKER=FOLDER`` keeps the box's images, wheels and base system between runs (some 8 GB).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
BASE = "python:3.11-slim"
CPU = "https://download.pytorch.org/whl/cpu"
WHEELHOUSE = "localhost/wheelhouse:latest"
TOOLS = ("dockerd", "docker-compose", "debootstrap", "ip", "unshare")
NOT_IN_IMAGES = ("gt-all", "hypothesis", "mypy", "pytest", "ruff", "ast_serialize")  # of the lock: for development


@dataclass
class Engine:
    """A Docker engine and its command lines.

    Args:
        docker: the client.
        compose: ``docker compose`` or ``docker-compose``.
        environment: for both.
        build: arguments of a build, where packages do not come from an index.
    """

    docker: list[str]
    compose: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    build: dict[str, str] = field(default_factory=dict)

    def run(self, *words: object, check: bool = True, timeout: float = 600) -> str:
        """A docker command's output. Raises AssertionError with what it said."""
        return self._run([*self.docker, *map(str, words)], {}, check, timeout)

    def compose_run(
        self, files: Sequence[Path], variables: dict[str, str], *words: object, timeout: float = 900
    ) -> str:
        """A compose command's output."""
        chosen = [word for file in files for word in ("-f", str(file))]
        return self._run([*self.compose, *chosen, *map(str, words)], variables, True, timeout)

    def _run(self, command: list[str], variables: dict[str, str], check: bool, timeout: float) -> str:
        done = subprocess.run(
            command,
            env=os.environ | self.environment | variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        said = f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        assert not check or done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{said}"
        return done.stdout


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A Docker engine that can build, and has or can get the base image and the packages."""
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
        compose = ["docker", "compose"]
        if subprocess.run([*compose, "version"], capture_output=True).returncode != 0:
            compose = ["docker-compose"]
        yield Engine(["docker"], compose, {"DOCKER_BUILDKIT": "1", "COMPOSE_DOCKER_CLI_BUILD": "1"})
        return
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no Docker engine answers, and none can be started: {', '.join(missing)} not installed")
    if sys.version_info[:2] != (3, 11):
        pytest.skip(
            "no Docker engine answers, and wheels for an image's Python 3.11 are collected by a Python 3.11 only"
        )
    if os.geteuid() != 0:
        pytest.skip("no Docker engine answers, and only root can start one")
    kept = os.environ.get("FEDLAB_TEST_DOCKER")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("docker")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        wheels, system = _wheels(folder), _system(folder)  # before the box: nothing in it reaches a network
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no base system or no wheels to build from: {' '.join(map(str, error.cmd))[:200]} failed")
    with subprocess.Popen(
        ["unshare", "--mount", "--net", "--propagation", "private", "bash", Path(__file__).with_name("box.sh"), folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as box:
        assert box.stdin is not None
        assert box.stdout is not None
        if box.stdout.readline() != "up\n":
            pytest.skip("dockerd does not start here; its last words are above")
        found = Engine(["/usr/bin/docker"], ["docker-compose"])
        found.environment = {
            "DOCKER_HOST": f"unix://{folder}/docker.sock",
            "DOCKER_BUILDKIT": "1",
            "COMPOSE_DOCKER_CLI_BUILD": "1",
            "PATH": f"/usr/bin:{os.environ['PATH']}",
        }
        found.build = {"WHEELHOUSE_IMAGE": WHEELHOUSE, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
        _import(found, system, BASE)
        _import(found, wheels, WHEELHOUSE)
        try:
            yield found
        finally:
            box.stdin.close()
            box.wait(180)
            if not kept:
                shutil.rmtree(folder, ignore_errors=True)


def _wheels(folder: Path) -> Path:
    """A folder of what the lock pins, as wheels for the images' Python."""
    wheels = folder / "wheels"
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith(("#", *NOT_IN_IMAGES))]
    wanted = folder / "wanted.txt"
    if wheels.is_dir() and wanted.is_file() and wanted.read_text() == "\n".join(pins):
        return wheels
    wheels.mkdir(exist_ok=True)
    wanted.write_text("\n".join(pins))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", wheels]
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    try:
        subprocess.run([*pip, "--retries", "0", "--index-url", CPU, torch], check=True)
        subprocess.run([*pip, "--find-links", wheels, "-r", wanted], check=True)
    except BaseException:
        wanted.unlink()
        raise
    return wheels


def _system(folder: Path) -> Path:
    """A root file system that stands in for the base image: Debian's Python 3.11."""
    system = folder / "rootfs"
    if (system / "usr/bin/python").exists():
        return system
    mirror = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Codename: bookworm"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    packages = "--include=ca-certificates,python3,python3-pip,python3-venv"
    subprocess.run(
        ["debootstrap", "--variant=minbase", packages, "bookworm", system, *mirror[:1]],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    (system / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink(missing_ok=True)  # as in the image that it stands in for
    for left in ("etc/apt/sources.list", "etc/resolv.conf", "etc/hostname", "var/log/bootstrap.log"):  # of this machine
        (system / left).unlink(missing_ok=True)
    (system / "usr/bin/python").symlink_to("python3")
    return system


def _import(engine: Engine, folder: Path, tag: str) -> None:
    """A folder as an image of one layer; again only where something in it is new."""
    stamp = folder.with_name(f"{folder.name}.imported")
    listing = "\n".join(sorted(path.name for path in folder.iterdir()))
    if engine.run("images", "-q", tag).strip() and stamp.is_file() and stamp.read_text() == listing:
        return
    with subprocess.Popen(
        ["tar", "-C", folder, "--exclude=./proc/*", "--exclude=./sys/*", "--exclude=./dev/*", "-cf", "-", "."],
        stdout=subprocess.PIPE,
    ) as tar:
        command = [*engine.docker, "import", "-c", 'CMD ["python3"]', "-c", "ENV LANG=C.UTF-8", "-", tag]
        subprocess.run(
            command, stdin=tar.stdout, env=os.environ | engine.environment, check=True, stdout=subprocess.DEVNULL
        )
    stamp.write_text(listing)
