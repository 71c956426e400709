"""X.509 certificates of a deployment: a private authority that signs one server certificate, and nothing else.

EC P-384 keys, SHA-384. The authority may sign no other authority (path length 0); a server's certificate serves TLS
servers only. Not for node keys, which are plain key pairs (``keys``): a node is known by its key, never by a
certificate.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlab.errors import ConfigError

CA_DAYS, SERVER_DAYS = 3650, 365
SOON_DAYS = 30  # before the end of a certificate it is said at every start
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # in every server certificate: the coordinator's own programs
_SKEW = timedelta(hours=1)  # a clock that is behind must not find a new certificate not valid yet
_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*\.?")


@dataclass(frozen=True)
class Certificate:
    """What there is to say of a certificate file.

    Args:
        path: the file.
        certificate: what it holds.
    """

    path: Path
    certificate: x509.Certificate

    @property
    def until(self) -> datetime:
        return self.certificate.not_valid_after_utc

    @property
    def hosts(self) -> list[str]:
        """Names and addresses that it is valid for, in the order they stand there."""
        try:
            found = self.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return []
        return [str(name.value) for name in found]

    def days_left(self, now: datetime | None = None) -> int:
        """Whole days until it ends; negative once it has ended."""
        return (self.until - (now or datetime.now(UTC))).days

    def check_dates(self, fix: str, now: datetime | None = None) -> list[str]:
        """A warning if it ends soon. Raises ConfigError if it has ended, or has not begun; ``fix`` says what helps."""
        now = now or datetime.now(UTC)
        if now > self.until:
            raise ConfigError(f"{self.path} has expired on {self.until:%Y-%m-%d}; {fix}")
        begin = self.certificate.not_valid_before_utc
        if now < begin:
            raise ConfigError(f"{self.path} is not valid before {begin:%Y-%m-%d %H:%M} UTC; set this machine's clock")
        left = self.days_left(now)
        if left <= SOON_DAYS:
            return [f"{self.path} expires on {self.until:%Y-%m-%d}, in {left} day{'' if left == 1 else 's'}; {fix}"]
        return []


def new_key() -> ec.EllipticCurvePrivateKey:
    """A private key on P-384."""
    return ec.generate_private_key(ec.SECP384R1())


def make_authority(key: ec.EllipticCurvePrivateKey, days: int = CA_DAYS, now: datetime | None = None) -> bytes:
    """The certificate of a new authority, which signs itself, as PEM."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedlab authority {secrets.token_hex(4)}")])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    builder = _builder(name, name, key, days, now).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    return _signed(builder.add_extension(usage, True), key)


def make_server_certificate(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
    days: int = SERVER_DAYS,
    now: datetime | None = None,
) -> bytes:
    """A certificate for TLS servers with these names, and for loopback, as PEM; it ends no later than its authority."""
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *LOOPBACK])]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedlab server")])
    signer = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        _builder(subject, authority.subject, key, days, now, authority.not_valid_after_utc)
        .add_extension(x509.SubjectAlternativeName(names), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        .add_extension(_usage(digital_signature=True), True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer), False)
    )
    return _signed(builder, authority_key)


def parse_certificate(pem: bytes) -> x509.Certificate:
    """A certificate from PEM. Raises ValueError."""
    return x509.load_pem_x509_certificate(pem)


def read_certificate(path: Path) -> Certificate:
    """A certificate from its PEM file. Raises ConfigError."""
    try:
        return Certificate(path, parse_certificate(path.read_bytes()))
    except OSError as error:
        raise ConfigError(f"cannot read certificate {str(path)!r}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{str(path)!r} is no certificate (PEM)") from None


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A private EC key from its PEM file (not OpenSSH's format). Raises ConfigError."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise ConfigError(f"cannot read private key {str(path)!r}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise ConfigError(f"{str(path)!r} is no private key (PEM, without a passphrase)") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{str(path)!r} is no EC key")
    return key


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PEM, not encrypted: whoever starts a server at night has no passphrase."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def check_issued(certificate: Certificate, authority: Certificate) -> None:
    """Raise ConfigError unless ``authority`` signed the certificate."""
    try:
        certificate.certificate.verify_directly_issued_by(authority.certificate)
    except (InvalidSignature, ValueError, TypeError):
        raise ConfigError(
            f"{certificate.path} was not signed by {authority.path}; give both of one authority, or make a new"
            " certificate with fedlab keys renew"
        ) from None


def check_host(host: str) -> str:
    """The host itself, without the dot at its end. Raises ConfigError unless a certificate can name it."""
    try:
        return str(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    try:
        ascii_host = host.encode("idna").decode() if not host.isascii() else host
    except UnicodeError:
        ascii_host = ""
    if not _HOST.fullmatch(ascii_host) or len(ascii_host) > 253:
        raise ConfigError(
            f"--host {host!r} is neither a host name nor an IP address; write it without a port or scheme, for example"
            " --host fed.example.org"
        )
    return ascii_host.rstrip(".").lower()


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    days: int,
    now: datetime | None,
    latest: datetime | None = None,
) -> x509.CertificateBuilder:
    begin = now or datetime.now(UTC)
    end = begin + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - _SKEW)
        .not_valid_after(min(end, latest) if latest is not None else end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    )


def _signed(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> bytes:
    return builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def _usage(**allowed: bool) -> x509.KeyUsage:
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names})
