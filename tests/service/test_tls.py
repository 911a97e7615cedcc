"""The service speaks HTTPS, with a certificate that is replaced while it runs."""

import datetime
import json
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from service import __main__, settings
from service.tls import Tls, TlsRefused

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]


def certify(folder: Path, serial: int) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    address = x509.IPAddress(ip_address("127.0.0.1"))
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    files = folder / "cert.pem", folder / "key.pem"
    files[0].write_bytes(made.public_bytes(pem))
    files[1].write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return files


def shown(url: str, trusted: Path, version: ssl.TLSVersion | None = None) -> tuple[int, str | None]:
    """The serial number of the certificate, and the version of TLS."""
    context = ssl.create_default_context(cafile=str(trusted))
    if version is not None:
        context.minimum_version = context.maximum_version = version
    host, port = url.removeprefix("https://").split(":")
    with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain, server_hostname=host) as tls:
        found = tls.getpeercert(binary_form=True)
        assert found
        return x509.load_der_x509_certificate(found).serial_number, tls.version()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_https_with_a_certificate_that_is_replaced(
    workers: str, publish: Callable[[int], Path], tmp_path: Path, started: Started
) -> None:
    publish(1)
    cert, key = certify(tmp_path, 1)
    flags = ["--bundles", str(tmp_path), "--workers", workers, "--tls-cert", str(cert), "--tls-key", str(key)]
    with started(*flags) as (process, url):
        assert url.startswith("https://")
        asked = {"instances": [{}]}
        with httpx.Client(verify=ssl.create_default_context(cafile=str(cert))) as client:
            assert client.post(f"{url}/v1/models/tiny-fm:predict", json=asked).status_code == 200
            with pytest.raises(httpx.HTTPError):
                httpx.get(url.replace("https", "http") + "/livez")
            assert shown(url, cert) == (1, "TLSv1.3")
            assert shown(url, cert, ssl.TLSVersion.TLSv1_2) == (1, "TLSv1.2")
            with pytest.warns(DeprecationWarning, match="TLSv1_1"), pytest.raises(ssl.SSLError):
                shown(url, cert, ssl.TLSVersion.TLSv1_1)
            old = cert.read_text(), key.read_text()
            trusted = tmp_path / "trusted.pem"
            trusted.write_text(old[0])
            for file, kept in zip((cert, key), old, strict=True):
                certify(tmp_path, 2)
                file.write_text(kept)  # the other one is new, and does not fit it
                process.send_signal(signal.SIGHUP)
                time.sleep(0.3)
                assert {shown(url, trusted)[0] for _ in range(8)} == {1}
            certify(tmp_path, 3)
            process.send_signal(signal.SIGHUP)
            time.sleep(0.3)
            assert {shown(url, cert)[0] for _ in range(8)} == {3}
            assert (
                client.post(f"{url}/v1/models/tiny-fm:predict", json=asked).status_code == 200
            )  # on the old connection
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0
        assert process.stderr
        events = [json.loads(line)["event"] for line in process.stderr]
    read = int(workers)
    assert (events.count("certificate not read"), events.count("certificate read")) == (2 * read, read)


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["nothing", "the beginning of a hello"])
def test_a_handshake_has_the_time_of_a_head(
    said: bytes, publish: Callable[[int], Path], tmp_path: Path, started: Started
) -> None:
    publish(1)
    cert, key = certify(tmp_path, 1)
    flags = ["--bundles", str(tmp_path), "--tls-cert", str(cert), "--tls-key", str(key), "--header-timeout", "1"]
    with started(*flags) as (_, url), socket.create_connection(url.removeprefix("https://").split(":")) as silent:
        since = time.monotonic()
        silent.sendall(said)
        silent.settimeout(10)
        with suppress(ConnectionResetError):
            assert silent.recv(100) == b""
        assert 0.5 < time.monotonic() - since < 3


def test_a_certificate_that_cannot_be_used_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cert, key = certify(tmp_path, 1)
    (tmp_path / "none.pem").write_text("nothing")
    locked = serialization.load_pem_private_key(key.read_bytes(), None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    (tmp_path / "locked.pem").write_bytes(locked)
    for flags, reason in (
        (["--tls-cert", str(tmp_path / "absent")], "No such file"),
        (["--tls-cert", str(cert)], "cannot be used"),
        (["--tls-cert", str(tmp_path / "none.pem")], "cannot be used"),
        (["--tls-cert", str(cert), "--tls-key", str(tmp_path / "locked.pem")], "without a password"),
        (["--tls-key", str(key)], "tls_key is set without tls_cert"),
    ):
        assert __main__.main(flags) == 1
        said = capsys.readouterr().err
        assert reason in said
        assert len(said.splitlines()) == 1


def test_a_certificate_and_its_key_may_be_one_file(tmp_path: Path) -> None:
    cert, key = certify(tmp_path, 1)
    both = tmp_path / "both.pem"
    both.write_text(cert.read_text() + key.read_text())
    tls = Tls.of(settings.load(["--tls-cert", str(both)]))
    assert tls
    assert tls.context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert Tls.of(settings.load([])) is None
    with pytest.raises(TlsRefused):
        Tls(cert, None)
