"""Keys of a deployment: what is made, what is refused, and what is said of its end."""

from __future__ import annotations

import os
import shutil
import ssl
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from typer.testing import CliRunner

from fedlab.cli import app
from fedlab.errors import ConfigError
from fedlab.run.launch.deploy import certificates, keys


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    keys.init(path, ["Fed.Example.org", "10.1.2.3"])
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_private_files_are_their_owners_alone(directory: Path, tmp_path: Path):
    before = os.umask(0)
    try:
        private, public = keys.make_node("north", tmp_path / "new")
    finally:
        os.umask(before)
    assert [mode(directory / name) for name in ("ca.key", "server.key", "executor.secret")] == [0o600] * 3
    assert mode(directory) == mode(directory / "nodes") == mode(tmp_path / "new") == 0o700
    assert mode(private) == 0o600
    assert mode(public) == 0o644


def test_certificates_say_what_they_are_for(directory: Path):
    authority = certificates.read_certificate(directory / "ca.crt").certificate
    server = certificates.read_certificate(directory / "server.crt")
    basic = authority.extensions.get_extension_for_class(certificates.x509.BasicConstraints)
    usage = authority.extensions.get_extension_for_class(certificates.x509.KeyUsage)
    assert basic.critical
    assert (basic.value.ca, basic.value.path_length) == (True, 0)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature
    assert server.hosts == ["fed.example.org", "10.1.2.3", "localhost", "127.0.0.1", "::1"]
    assert not server.certificate.extensions.get_extension_for_class(certificates.x509.BasicConstraints).value.ca


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_the_chain_passes_a_strict_check(directory: Path):
    strict = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver"]
    done = subprocess.run(
        [*strict, "-CAfile", directory / "ca.crt", directory / "server.crt"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.crt", directory / "server.key")


def test_nothing_is_overwritten_or_half_made(directory: Path, tmp_path: Path):
    secret = (directory / "executor.secret").read_bytes()
    with pytest.raises(ConfigError, match="never overwritten"):
        keys.init(directory, ["other"])
    assert (directory / "executor.secret").read_bytes() == secret
    (tmp_path / "executor.secret").write_text("mine")
    with pytest.raises(ConfigError, match=r"executor\.secret is there"):
        keys.init(tmp_path, ["other"])
    assert [path.name for path in tmp_path.iterdir()] == ["executor.secret"]


def test_what_fails_in_between_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def create(path: Path, *rest: object) -> bool:
        if path.name == "server.crt":
            raise OSError(28, "No space left on device")
        return bool(real(path, *rest))

    real = keys.files.create
    monkeypatch.setattr(keys.files, "create", create)
    with pytest.raises(OSError, match="No space"):
        keys.init(tmp_path / "keys", ["host"])
    assert list((tmp_path / "keys").iterdir()) == []


@pytest.mark.parametrize("host", ["https://fed.example.org", "fed.example.org:8443", "-a", "", "a b", "*"])
def test_a_host_is_a_name_or_an_address(tmp_path: Path, host: str):
    with pytest.raises(ConfigError, match="neither a host name nor an IP address"):
        keys.init(tmp_path / "keys", [host])
    assert not (tmp_path / "keys").exists()


def test_a_node_is_let_in_and_shut_out(directory: Path, tmp_path: Path):
    _, public = keys.make_node("north", tmp_path)
    node = keys.add_node(directory, public)
    assert keys.add_node(directory, public) == node  # once more changes nothing
    assert [key.fingerprint for key in keys.node_keys(directory)] == [node.fingerprint]
    assert f"north  {node.fingerprint}" in "\n".join(keys.show(directory))
    (tmp_path / "south.pub").write_bytes(public.read_bytes())
    with pytest.raises(ConfigError, match="is the key of 'north'"):
        keys.add_node(directory, tmp_path / "south.pub")
    _, other = keys.make_node("north", tmp_path / "other")
    with pytest.raises(ConfigError, match="is another key"):
        keys.add_node(directory, other)
    with pytest.raises(ConfigError, match="no node 'sout'"):
        keys.remove_node(directory, "sout")
    keys.remove_node(directory, "north")
    assert keys.node_keys(directory) == []


def test_what_is_no_public_key_is_refused(directory: Path, tmp_path: Path):
    private, _ = keys.make_node("north", tmp_path)
    with pytest.raises(ConfigError, match="never leaves its client"):
        keys.add_node(directory, private)
    (tmp_path / "east.pub").write_text("nothing")
    with pytest.raises(ConfigError, match="is no public key"):
        keys.add_node(directory, tmp_path / "east.pub")
    edwards = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl x"
    (tmp_path / "west.pub").write_text(edwards)
    with pytest.raises(ConfigError, match="no EC key"):
        keys.add_node(directory, tmp_path / "west.pub")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")
def test_fingerprints_are_those_of_ssh(tmp_path: Path):
    _, public = keys.make_node("north", tmp_path)
    printed = subprocess.run(["ssh-keygen", "-lf", public], capture_output=True, text=True, check=True).stdout
    assert printed.split()[1] == keys.fingerprint(keys.read_public_key(public))


def test_a_node_key_is_one_that_flower_reads(tmp_path: Path):
    private, public = keys.make_node("north", tmp_path)
    key = serialization.load_ssh_private_key(private.read_bytes(), None)
    assert key.public_key() == keys.read_public_key(public)
    assert key.public_key().curve.name == "secp384r1"  # type: ignore[union-attr]


def test_renewal_keeps_the_authority_the_key_and_the_names(tmp_path: Path):
    keys.init(tmp_path, ["fed.example.org"], days=3)
    assert "expires on" in keys.check_server(tmp_path)[0]
    old, authority = (tmp_path / "server.key").read_bytes(), (tmp_path / "ca.crt").read_bytes()
    renewed = keys.renew(tmp_path)
    assert renewed.hosts[0] == "fed.example.org"
    assert renewed.days_left() >= 364
    assert ((tmp_path / "server.key").read_bytes(), (tmp_path / "ca.crt").read_bytes()) == (old, authority)
    assert keys.check_server(tmp_path) == []
    (tmp_path / "server.key").unlink()
    keys.renew(tmp_path, ["other"])
    assert (tmp_path / "server.key").read_bytes() != old
    assert mode(tmp_path / "server.key") == 0o600
    assert keys.check_server(tmp_path) == []
    (tmp_path / "ca.key").unlink()
    with pytest.raises(ConfigError, match=r"ca\.key is not there"):
        keys.renew(tmp_path)
    assert keys.check_server(tmp_path) == []  # a server needs it not


def test_what_has_expired_is_refused_with_the_remedy(tmp_path: Path):
    keys.init(tmp_path, ["host"])
    authority = certificates.read_certificate(tmp_path / "ca.crt").certificate
    ca_key, key = (certificates.read_private_key(tmp_path / name) for name in ("ca.key", "server.key"))
    past = datetime.now(UTC) - timedelta(days=20)
    made = certificates.make_server_certificate(authority, ca_key, key, ["host"], 10, past)
    (tmp_path / "server.crt").write_bytes(made)
    with pytest.raises(ConfigError, match=r"has expired on .*; make a new one with fedlab keys renew"):
        keys.check_server(tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path):
    for name in ("one", "two"):
        keys.init(tmp_path / name, ["host"])
    for name in ("server.crt", "server.key"):
        shutil.copy(tmp_path / "two" / name, tmp_path / "one" / name)
    with pytest.raises(ConfigError, match=r"was not signed by"):
        keys.check_server(tmp_path / "one")
    shutil.copy(tmp_path / "one" / "server.key", tmp_path / "two" / "server.key")
    keys.renew(tmp_path / "two")
    keys.init(tmp_path / "three", ["host"])
    shutil.copy(tmp_path / "three" / "server.key", tmp_path / "two" / "server.key")
    with pytest.raises(ConfigError, match=r"is not of .*server\.key"):
        keys.check_server(tmp_path / "two")


def test_a_client_is_told_what_is_wrong_with_its_keys(tmp_path: Path):
    keys.init(tmp_path / "keys", ["host"])
    private, public = keys.make_node("north", tmp_path)
    ca = tmp_path / "keys" / "ca.crt"
    assert keys.check_client(ca, private) == []
    private.chmod(0o644)
    assert "can be read by others" in keys.check_client(ca, private)[0]
    with pytest.raises(ConfigError, match="no node's private key"):
        keys.check_client(ca, public)
    with pytest.raises(ConfigError, match="fedlab keys node"):
        keys.check_client(ca, tmp_path / "none")
    with pytest.raises(ConfigError, match="no certificate"):
        keys.check_client(private, private)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(app, ["keys", "init", "keys", "--host", "fed.example.org"])
    assert told.exit_code == 0, told.output
    assert "for fed.example.org, localhost" in told.output
    for command in (["node", "north"], ["add", "keys", "north.pub"], ["renew", "keys"], ["remove", "keys", "north"]):
        done = CliRunner().invoke(app, ["keys", *command])
        assert done.exit_code == 0, done.output
    assert "none yet" in CliRunner().invoke(app, ["keys", "show", "keys"]).output
    assert CliRunner().invoke(app, ["keys", "init", "keys", "--host", "x"]).exit_code == 2
    assert CliRunner().invoke(app, ["keys", "init", "other"]).exit_code == 2
