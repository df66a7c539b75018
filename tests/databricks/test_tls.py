"""An MLflow server behind an authority of the company's own: trusted as mlflow itself is told to."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.databricks.conftest import Pull
from tests.databricks.runner import failed


class _Nothing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server whose certificate only the returned file vouches for; MLFLOW_TRACKING_URI names it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    file = tmp_path / "server.pem"
    file.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(pem)
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Nothing)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    yield file
    server.shutdown()
    server.server_close()


def test_the_authority_that_mlflow_is_told_to_trust(server: Path, pull: Pull, monkeypatch) -> None:
    failed(pull("models:/a/1"), "No answer", "SSLError", "certificate")
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(server))
    failed(pull("models:/a/1"), "404")


def test_a_certificate_that_is_not_to_be_looked_at(server: Path, pull: Pull, monkeypatch, recwarn) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    failed(pull("models:/a/1"), "404")
