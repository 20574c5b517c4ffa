"""Fetching lists from sites that answer as they should, and from those that do not."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import BinaryIO

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from proxystash.feeding.download import Downloader, Validators
from proxystash.feeding.failures import SourceError
from proxystash.feeding.sources import parse_sources

from .site import Answer, Request, Site, running_site

SECRET = "s3cr3t"
LIMIT = 100_000


def fetch(
    url: str, known: Validators | None = None, *, timeout: float = 30, max_redirects: int = 3
) -> tuple[bytes, Validators] | None:
    """What one fetch gives."""
    [source] = parse_sources([url])

    async def run() -> tuple[BinaryIO, Validators] | None:
        downloader = Downloader(timeout=timeout, limit=LIMIT, max_redirects=max_redirects)
        try:
            return await downloader.fetch(source, known)
        finally:
            await downloader.close()

    got = asyncio.run(run())
    if got is None:
        return None
    file, validators = got
    with file:
        file.seek(0)
        return file.read(), validators


def refusal(url: str, *, timeout: float = 30, max_redirects: int = 3) -> str:
    """Why a fetch fails."""
    with pytest.raises(SourceError) as caught:
        fetch(url, timeout=timeout, max_redirects=max_redirects)
    # Nothing of what the other side said, and no URL, hangs on to it.
    assert caught.value.__cause__ is None
    return str(caught.value)


def redirect(location: str, status: int = 302) -> Answer:
    return lambda request: request.answer(status, headers={"Location": location})


# --- what is as it should be


def test_a_list_is_fetched_without_credentials_or_cookies(site: Site) -> None:
    site.serves(b"192.0.2.1:80\n", Set_Cookie="a=b")

    assert fetch(site.url())[0] == fetch(site.url())[0] == b"192.0.2.1:80\n"  # type: ignore[index]
    for headers in site.headers_of("/list.txt"):
        assert not {"Authorization", "Cookie", "If-None-Match", "If-Modified-Since"} & set(headers)
        assert headers["Accept-Encoding"] == "gzip"


def test_credentials_in_the_url_are_sent_as_a_header(site: Site) -> None:
    site.serves(b"x")

    fetch(site.url(userinfo="ann:p%3Aw"))

    [headers] = site.headers_of("/list.txt")
    assert headers["Authorization"] == "Basic YW5uOnA6dw=="
    assert "ann" not in headers["Host"]


def test_what_has_not_changed_is_not_sent_again(site: Site) -> None:
    def answer(request: Request) -> None:
        if request.headers["If-None-Match"] == '"1"' or request.headers["If-Modified-Since"] == "then":
            request.answer(304)
        else:
            request.answer(200, b"x", {"ETag": '"1"', "Last-Modified": "then"})

    site.answers["/list.txt"] = answer
    _, known = fetch(site.url())  # type: ignore[misc]

    assert fetch(site.url(), known) is None
    assert site.headers_of("/list.txt")[1]["If-None-Match"] == '"1"'
    assert site.headers_of("/list.txt")[1]["If-Modified-Since"] == "then"


def test_the_environments_proxy_is_not_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.serves(b"x")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)

    assert fetch(site.url()) is not None


def test_no_credentials_are_taken_from_a_netrc(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login ann password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(netrc))
    site.serves(b"x")

    fetch(site.url())

    assert "Authorization" not in site.headers_of("/list.txt")[0]


# --- redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_with_the_credentials_of_its_host(site: Site, status: int) -> None:
    site.answers["/old"] = redirect("/list.txt", status)
    site.serves(b"x")

    assert fetch(site.url("/old", userinfo=f"ann:{SECRET}"))[0] == b"x"  # type: ignore[index]
    assert "Authorization" in site.headers_of("/list.txt")[0]


def test_another_host_or_port_gets_no_credentials(site: Site) -> None:
    with running_site() as other:
        site.answers["/to-port"] = redirect(other.url())
        site.answers["/to-host"] = redirect(site.url(host="localhost"))
        other.serves(b"port")
        site.serves(b"host")

        assert fetch(site.url("/to-port", userinfo=f"ann:{SECRET}"))[0] == b"port"  # type: ignore[index]
        assert fetch(site.url("/to-host", userinfo=f"ann:{SECRET}"))[0] == b"host"  # type: ignore[index]
        assert "Authorization" in site.headers_of("/to-port")[0]
        assert "Authorization" not in other.headers_of("/list.txt")[0]
        assert "Authorization" not in site.headers_of("/list.txt")[0]


def test_credentials_in_a_redirect_go_nowhere(site: Site) -> None:
    with running_site() as other:
        site.answers["/old"] = redirect(other.url(userinfo=f"ann:{SECRET}"))
        other.serves(b"x")

        _, known = fetch(site.url("/old"))  # type: ignore[misc]

        assert "Authorization" not in other.headers_of("/list.txt")[0]
        assert SECRET not in str(known.url)


def test_only_who_said_a_version_is_asked_for_it(site: Site) -> None:
    with running_site() as other:
        site.answers["/old"] = redirect(other.url())
        other.serves(b"x", ETag='"1"')

        _, known = fetch(site.url("/old"))  # type: ignore[misc]
        fetch(site.url("/old"), known)

        assert "If-None-Match" not in site.headers_of("/old")[1]
        assert other.headers_of("/list.txt")[1]["If-None-Match"] == '"1"'


def test_a_loop_of_redirects_ends(site: Site) -> None:
    site.answers["/list.txt"] = redirect("/list.txt")

    assert refusal(site.url()) == "redirected more than 3 times"
    assert len(site.headers_of("/list.txt")) == 4


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("", "redirects to nowhere"),
        ("file:///etc/passwd", "redirects to what is no URL with http or https"),
        ("http://127.0.0.1:99999/", "the answer is no proper HTTP"),
    ],
)
def test_a_redirect_leads_to_a_site_or_nowhere(site: Site, location: str, reason: str) -> None:
    site.answers["/list.txt"] = redirect(location)

    assert refusal(site.url()) == reason


# --- answers that are none


@pytest.mark.parametrize("status", [201, 206, 304, 400, 401, 403, 404, 429, 500, 503])
def test_any_other_status_is_a_failure(site: Site, status: int) -> None:
    site.serves(SECRET.encode() if status != 304 else b"", status=status)

    assert refusal(site.url()) == f"answers with status {status}"


def test_what_says_that_it_is_too_large_is_not_read(site: Site) -> None:
    def answer(request: Request) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(LIMIT + 1))
        request.end_headers()

    site.answers["/list.txt"] = answer

    assert refusal(site.url()) == "larger than 100,000 bytes"


def test_what_never_ends_is_given_up_at_the_limit(site: Site) -> None:
    sent = 0

    def answer(request: Request) -> None:
        nonlocal sent
        request.send_response(200)
        request.end_headers()
        while not site.stopping.is_set():
            request.wfile.write(b"192.0.2.1:80\n" * 1000)
            sent += 13_000

    site.answers["/list.txt"] = answer

    assert refusal(site.url()) == "larger than 100,000 bytes"
    # What the kernel had room for, perhaps, but no more.
    assert sent < 100 * LIMIT


def test_exactly_the_limit_is_taken(site: Site) -> None:
    site.serves(b"x" * LIMIT)

    assert len(fetch(site.url())[0]) == LIMIT  # type: ignore[index]


def test_one_deadline_holds_for_all_of_it(site: Site) -> None:
    """Given answers that never come, or byte by byte, in their head or their body."""

    def silent(request: Request) -> None:
        site.stopping.wait()

    def drips_its_head(request: Request) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not site.stopping.wait(0.01):
            request.wfile.write(b"x")

    def drips_its_body(request: Request) -> None:
        request.send_response(200)
        request.end_headers()
        while not site.stopping.wait(0.01):
            request.wfile.write(b"x")

    def leads_on(request: Request) -> None:
        site.stopping.wait(0.05)
        request.answer(302, headers={"Location": "/list.txt"})

    for answer in (silent, drips_its_head, drips_its_body, leads_on):
        site.answers["/list.txt"] = answer
        reason = refusal(site.url(), timeout=0.3, max_redirects=1_000)
        assert reason == "no whole answer within 0.3 s"


def test_what_breaks_off_is_not_taken_for_the_whole(site: Site) -> None:
    def answer(request: Request) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        request.wfile.write(b"192.0.2.1:80\n")
        request.close_connection = True

    site.answers["/list.txt"] = answer

    assert refusal(site.url()) == "the answer broke off"


@pytest.mark.parametrize(
    "said",
    [b"", b"SSH-2.0-x\r\n", b"\x00" * 100, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000,
     b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1_000_000],
    ids=["nothing", "another protocol", "zeros", "headers without end", "a negative length", "a long line"],
)  # fmt: skip
def test_garbage_is_a_failure(site: Site, said: bytes) -> None:
    def answer(request: Request) -> None:
        request.wfile.write(said)
        request.close_connection = True

    site.answers["/list.txt"] = answer

    assert refusal(site.url()) in {"the answer broke off", "the answer is no proper HTTP"}


def test_another_encoding_than_the_one_asked_for_is_refused(site: Site) -> None:
    site.serves(b"x", Content_Encoding="br")

    assert refusal(site.url()) == "packed in another way than gzip"


def test_nobody_there_is_a_failure() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]

        assert refusal(f"http://ann:{SECRET}@127.0.0.1:{port}/").startswith("no connection: ")


# --- https


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1, with its key, that its holder has made."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("certificate") / "site.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def secure_site(certificate: Path) -> Iterator[Site]:
    with running_site(certificate) as site:
        yield site


def test_a_certificate_of_nobody_known_is_not_trusted(secure_site: Site) -> None:
    secure_site.serves(b"x")

    assert refusal(secure_site.url(userinfo=f"ann:{SECRET}")) == "its certificate is not to be trusted"
    assert secure_site.seen == []


def test_what_is_encrypted_does_not_lead_to_what_is_not(
    secure_site: Site, site: Site, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trusting)
    secure_site.serves(b"x")
    secure_site.answers["/old"] = redirect(site.url())

    assert fetch(secure_site.url()) is not None
    assert refusal(secure_site.url("/old")) == "redirects from https to http"
    assert site.seen == []


def test_nothing_is_left_open_when_a_fetch_is_cancelled(site: Site) -> None:
    asked = threading.Event()

    def silent(request: Request) -> None:
        asked.set()
        site.stopping.wait()

    site.answers["/list.txt"] = silent
    [source] = parse_sources([site.url()])

    async def run() -> None:
        downloader = Downloader(timeout=30, limit=LIMIT, max_redirects=0)
        task = asyncio.create_task(downloader.fetch(source, None))
        await asyncio.to_thread(asked.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await downloader.close()

    asyncio.run(run())
