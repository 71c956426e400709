"""Whether a client can reach its server, and if not, why, in a sentence: before Flower's programs say it in theirs."""

from __future__ import annotations

import contextlib
import socket
import ssl
from pathlib import Path

from cryptography import x509

from fedlab.config.server import split_address
from fedlab.errors import ConfigError, RunFailed
from fedlab.run.launch.deploy.certificates import SOON_DAYS, Certificate

SECONDS = 5.0
EXPIRED, NOT_YET = 10, 9  # OpenSSL's numbers of what is wrong with a certificate
WRONG_NAME, WRONG_ADDRESS = 62, 64


def check_server_certificate(address: str, ca: Path, seconds: float = SECONDS) -> list[str]:
    """Connect once, as a node will, and end the connection.

    Args:
        address: host:port of the server.
        ca: certificate of the authority that must have signed the server's.
        seconds: to wait for an answer.

    Returns:
        A warning, if the server's certificate ends soon.

    Raises:
        ConfigError: its certificate is expired, from another authority, or for another name; or no TLS is spoken there.
        RunFailed: nothing answers; it may be there later.
    """
    try:
        host, port = split_address(address)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(ca)
    except (OSError, ssl.SSLError):
        raise ConfigError(f"cannot read certificate {str(ca)!r}; ask the coordinator for the server's ca.crt") from None
    try:
        with (
            socket.create_connection((host, port), seconds) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            found = secured.getpeercert(binary_form=True)
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(_certificate_problem(address, ca, error)) from None
    except ssl.SSLError as error:
        raise ConfigError(f"{address} does not speak TLS ({error.reason}); is it the server's port?") from None
    except OSError as error:
        raise RunFailed(f"nothing answers at {address}: {error.strerror or error}") from None
    if found is None:
        return []
    certificate = Certificate(Path(address), x509.load_der_x509_certificate(found))
    left = certificate.days_left()
    if left > SOON_DAYS:
        return []
    return [
        f"the certificate of {address} expires on {certificate.until:%Y-%m-%d}, in {left} days; tell the coordinator"
    ]


def _certificate_problem(address: str, ca: Path, error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code == EXPIRED:
        when = ""
        with contextlib.suppress(OSError, ValueError):
            when = f" on {_presented(address).until:%Y-%m-%d}"
        return (
            f"the certificate of {address} has expired{when}, by this machine's clock; the coordinator makes a new one"
            " with fedlab keys renew"
        )
    if error.verify_code == NOT_YET:
        return f"the certificate of {address} is not valid yet, by this machine's clock; set the clock"
    if error.verify_code in (WRONG_NAME, WRONG_ADDRESS):
        names = ""
        with contextlib.suppress(OSError, ValueError):
            names = f", but for {', '.join(_presented(address).hosts)}"
        return (
            f"the certificate of {address} is not for that name{names}; use one of these, or ask the coordinator for a"
            " certificate with it (fedlab keys renew --host)"
        )
    return (
        f"the certificate of {address} was not signed by the authority in {ca} ({error.verify_message}); ask the"
        " coordinator for the server's ca.crt. If it is the right one, somebody else answers there"
    )


def _presented(address: str) -> Certificate:
    """What the server shows, whatever it is worth."""
    pem = ssl.get_server_certificate(split_address(address), timeout=SECONDS)
    return Certificate(Path(address), x509.load_pem_x509_certificate(pem.encode("ascii")))
