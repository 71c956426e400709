"""Keys of a deployment: what ``fedlab keys`` makes, checks and shows.

The coordinator's directory::

    ca.key   ca.crt           the authority; its key is needed to renew only, and may lie elsewhere until then
    server.key   server.crt   of the server
    executor.secret           whoever holds it may execute a run's server app, so it stays on the server's machine
    nodes/NAME.pub            the clients that are let in

A client gets ``ca.crt``, makes ``NAME.key`` and ``NAME.pub`` itself, and gives ``NAME.pub`` away. Private files have
mode 0600, directories 0700. No file is ever overwritten, but for a certificate that is renewed.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedlab import files
from fedlab.errors import ConfigError
from fedlab.identifiers import checked_identifier
from fedlab.run.launch.deploy.certificates import (
    CA_DAYS,
    SERVER_DAYS,
    Certificate,
    check_host,
    check_issued,
    make_authority,
    make_server_certificate,
    new_key,
    parse_certificate,
    private_pem,
    read_certificate,
    read_private_key,
)

CA_KEY, CA, SERVER_KEY, SERVER, SECRET, NODES = (
    "ca.key",
    "ca.crt",
    "server.key",
    "server.crt",
    "executor.secret",
    "nodes",
)
PRIVATE = 0o600
PUBLIC = 0o644
RENEW = "make a new one with fedlab keys renew DIR"
NEW_CA = "make new keys with fedlab keys init, and give every client the new ca.crt"


@dataclass(frozen=True)
class NodeKey:
    """A node's public key that is let in."""

    name: str
    public: ec.EllipticCurvePublicKey

    @property
    def fingerprint(self) -> str:
        """As ``ssh-keygen -l`` prints it."""
        return fingerprint(self.public)


def init(directory: Path, hosts: Sequence[str], days: int = SERVER_DAYS) -> None:
    """Make the coordinator's directory: an authority, a server certificate for ``hosts``, the executor's secret.

    Raises ConfigError if any of the files is there, or a host cannot be one.
    """
    names = [check_host(host) for host in hosts]
    if not names:
        raise ConfigError("fedlab keys init: give --host with the name or address by which clients reach the server")
    authority_key, server_key = new_key(), new_key()
    ca = make_authority(authority_key, max(CA_DAYS, days))
    authority = Certificate(directory / CA, parse_certificate(ca))
    made = {
        CA_KEY: (private_pem(authority_key), PRIVATE),
        SERVER_KEY: (private_pem(server_key), PRIVATE),
        SECRET: (secrets.token_hex(32).encode(), PRIVATE),
        SERVER: (make_server_certificate(authority.certificate, authority_key, server_key, names, days), PUBLIC),
        CA: (ca, PUBLIC),
    }
    _create_all(directory, made)
    (directory / NODES).mkdir(mode=0o700, exist_ok=True)


def make_node(name: str, directory: Path) -> tuple[Path, Path]:
    """A client's key pair, ``NAME.key`` and ``NAME.pub``, in OpenSSH's format. Raises ConfigError if one is there."""
    checked_identifier(name, "NAME")
    key = new_key()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    _create_all(
        directory, {f"{name}.key": (private, PRIVATE), f"{name}.pub": (_openssh(key.public_key(), name), PUBLIC)}
    )
    return directory / f"{name}.key", directory / f"{name}.pub"


def add_node(directory: Path, public: Path) -> NodeKey:
    """Let a node in: its public key is copied to ``nodes/``. The name is that of the file.

    A running server sees it within seconds. Raises ConfigError if the file holds no public EC key, if another key has
    that name, or if that key is in under another name.
    """
    name = checked_identifier(public.name.removesuffix(".pub"), "the file's name")
    key = read_public_key(public)
    _directory_of_keys(directory)
    for known in node_keys(directory):
        same = fingerprint(known.public) == fingerprint(key)
        if known.name.lower() == name.lower() and not same:
            raise ConfigError(
                f"{directory / NODES / name}.pub is another key ({known.fingerprint}); remove it first with fedlab keys"
                f" remove {directory} {known.name}"
            )
        if same and known.name != name:
            raise ConfigError(
                f"{public} is the key of {known.name!r}, which is in; every client needs a key of its own"
            )
    (directory / NODES).mkdir(mode=0o700, exist_ok=True)
    files.write(directory / NODES / f"{name}.pub", _openssh(key, name), PUBLIC)
    return NodeKey(name, key)


def remove_node(directory: Path, name: str) -> None:
    """Shut a node out. A running server refuses it within seconds. Raises ConfigError if there is none of that name."""
    _directory_of_keys(directory)
    known = [key.name for key in node_keys(directory)]
    if name not in known:
        raise ConfigError(f"no node {name!r} in {directory / NODES}; there: {', '.join(known) or 'none'}")
    files.below(directory / NODES, f"{name}.pub").unlink()
    files.fsync_directory(directory / NODES)


def renew(directory: Path, hosts: Sequence[str] = (), days: int = SERVER_DAYS) -> Certificate:
    """A new server certificate from the same authority; clients need nothing new.

    Args:
        directory: the coordinator's.
        hosts: names that it is for; default: those of the old one.
        days: until it ends.

    The server's private key stays, unless its file is gone: then a new one is made.
    """
    _directory_of_keys(directory)
    authority = read_certificate(directory / CA)
    authority.check_dates(NEW_CA)
    if not (directory / CA_KEY).is_file():
        raise ConfigError(f"{directory / CA_KEY} is not there; put the authority's key back for as long as this takes")
    authority_key = read_private_key(directory / CA_KEY)
    if authority_key.public_key() != authority.certificate.public_key():
        raise ConfigError(f"{directory / CA_KEY} is not the key of {directory / CA}")
    names = [check_host(host) for host in hosts] or read_certificate(directory / SERVER).hosts
    if (directory / SERVER_KEY).is_file():
        key = read_private_key(directory / SERVER_KEY)
    else:
        key = new_key()
        files.write(directory / SERVER_KEY, private_pem(key), PRIVATE)
    made = make_server_certificate(authority.certificate, authority_key, key, names, days)
    files.write(directory / SERVER, made, PUBLIC)
    return read_certificate(directory / SERVER)


def node_keys(directory: Path, problems: list[str] | None = None) -> list[NodeKey]:
    """The nodes that are let in, by name.

    Raises ConfigError for a file that holds no key; with ``problems`` it is noted there, and the others are returned.
    """
    paths = sorted((directory / NODES).glob("*.pub")) if (directory / NODES).is_dir() else []
    found = []
    for path in paths:
        try:
            if not path.name.startswith("."):
                found.append(NodeKey(path.name.removesuffix(".pub"), read_public_key(path)))
        except ConfigError as error:
            if problems is None:
                raise
            problems.append(str(error))
    return found


def check_server(directory: Path) -> list[str]:
    """What there is to warn of before a server starts with these keys.

    Raises ConfigError if a file is missing, a certificate has ended, or they do not belong together.
    """
    _directory_of_keys(directory)
    for name in (SERVER_KEY, SERVER, SECRET):
        if not (directory / name).is_file():
            raise ConfigError(
                f"{directory / name} is not there; make keys with fedlab keys init {directory} --host NAME"
            )
    authority, server = read_certificate(directory / CA), read_certificate(directory / SERVER)
    warnings = authority.check_dates(NEW_CA) + server.check_dates(RENEW.replace("DIR", str(directory)))
    check_issued(server, authority)
    if read_private_key(directory / SERVER_KEY).public_key() != server.certificate.public_key():
        raise ConfigError(f"{server.path} is not of {directory / SERVER_KEY}; {RENEW.replace('DIR', str(directory))}")
    if not (directory / SECRET).read_bytes():
        raise ConfigError(f"{directory / SECRET} is empty; make new keys with fedlab keys init")
    node_keys(directory)
    return warnings + open_to_others([directory / name for name in (CA_KEY, SERVER_KEY, SECRET)])


def check_client(ca: Path, key: Path) -> list[str]:
    """What there is to warn of before a client starts with these keys. Raises ConfigError if they cannot work."""
    authority = read_certificate(ca)
    warnings = authority.check_dates("ask the coordinator for the new ca.crt")
    try:
        private = serialization.load_ssh_private_key(key.read_bytes(), None)
    except OSError as error:
        raise ConfigError(
            f"cannot read the node's key {str(key)!r}: {error.strerror}; make one with fedlab keys node NAME"
        ) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{str(key)!r} is no node's private key; make one with fedlab keys node NAME") from None
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{str(key)!r} is no EC key; make one with fedlab keys node NAME")
    return warnings + open_to_others([key])


def show(directory: Path) -> list[str]:
    """Lines on what is in the coordinator's directory, and until when. Raises ConfigError if it holds no keys."""
    _directory_of_keys(directory)
    lines = []
    for what, name in (("authority", CA), ("server", SERVER)):
        if not (directory / name).is_file():
            lines.append(f"{what:<10} {name} is not there")
            continue
        certificate = read_certificate(directory / name)
        left = certificate.days_left()
        state = f"in {left} days" if left >= 0 else "expired"
        hosts = f", for {', '.join(certificate.hosts)}" if certificate.hosts else ""
        lines.append(f"{what:<10} until {certificate.until:%Y-%m-%d} ({state}){hosts}")
    for name in (CA_KEY, SERVER_KEY, SECRET):
        if not (directory / name).is_file():
            lines.append(f"{'':<10} {name} is not there")
    nodes = node_keys(directory)
    lines += [f"{'node':<10} {node.name}  {node.fingerprint}" for node in nodes]
    return lines if nodes else [*lines, f"{'node':<10} none yet: fedlab keys add {directory} NAME.pub"]


def read_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """A node's public key from its file, in OpenSSH's format. Raises ConfigError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read public key {str(path)!r}: {error.strerror}") from None
    if b"PRIVATE KEY" in content:
        raise ConfigError(f"{str(path)!r} is a private key, which never leaves its client; give the file NAME.pub")
    try:
        key = serialization.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{str(path)!r} is no public key; make one with fedlab keys node NAME") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{str(path)!r} is no EC key, which Flower asks for; make one with fedlab keys node NAME")
    return key


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key, as ``ssh-keygen -l`` prints it."""
    blob = base64.b64decode(_openssh(key, "").split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def open_to_others(paths: Sequence[Path]) -> list[str]:
    """A warning for each private file that others than its owner can read."""
    return [
        f"{path} can be read by others than its owner; chmod 600 {path}"
        for path in paths
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o077
    ]


def _openssh(key: ec.EllipticCurvePublicKey, name: str) -> bytes:
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line + f" {name}\n".encode()


def _directory_of_keys(directory: Path) -> None:
    if not (directory / CA).is_file():
        raise ConfigError(f"{directory} holds no keys; make them with fedlab keys init {directory} --host NAME")


def _create_all(directory: Path, content: dict[str, tuple[bytes, int]]) -> None:
    """Make the files, or none: what was made is removed if one cannot be. Raises ConfigError if one is there."""
    there = [name for name in content if (directory / name).exists()]
    if there:
        raise ConfigError(f"{directory / there[0]} is there; keys are never overwritten: choose another place")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make directory {str(directory)!r}: {error.strerror}") from None
    made: list[Path] = []
    try:
        for name, (text, mode) in content.items():
            if not files.create(directory / name, text, mode):
                raise ConfigError(f"{directory / name} was made meanwhile; choose another place")
            made.append(directory / name)
            (directory / name).chmod(mode)  # whatever the umask
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
