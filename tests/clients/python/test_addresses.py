"""Where a client goes, what does not steer it, and what may stand for a key."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

import grpc
import pytest

import proxystash
from proxystash import (
    AsyncClient,
    CacheEntry,
    Client,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    cache_key,
)

from .conftest import AnyClient, Connect
from .fake_service import FakeService

VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY")


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """What comes to a proxy that the environment names."""
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    received.append(connection.recv(1000))

        thread = threading.Thread(target=serve)
        thread.start()
        for name in VARIABLES:
            monkeypatch.setenv(name, f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        yield received
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_the_environments_proxies_never_steer_a_client(
    connect: Connect, fake_target: str, proxy: list[bytes]
) -> None:
    client = connect(fake_target)
    client.put(CacheEntry("http://h:1", username="u", password="secret"))
    assert client.get(cache_key("http://h:1", "u")) is not None
    assert client.stats().entries == 1
    assert proxy == []


def test_they_do_when_that_is_asked_for(connect: Connect, fake_target: str, proxy: list[bytes]) -> None:
    client = connect(fake_target, options=[("grpc.enable_http_proxy", 1)], retry=None, timeout=5)
    with pytest.raises(proxystash.ProxystashError):
        client.get("k")
    assert proxy[0].startswith(b"CONNECT")


@pytest.mark.parametrize(
    "target",
    ["", "localhost", "http://127.0.0.1:50051", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "h:65536", "h:x",
     "::1:50051", "http://user:secret@h:1", "h:1/path", "two words:1", "h:1\n", "dns:65536"],
)  # fmt: skip
def test_what_is_no_address_is_refused_at_once(connect: Connect, target: str) -> None:
    with pytest.raises(InvalidArgumentError, match="must be host:port, such as") as refused:
        connect(target)
    assert (refused.value.field, refused.value.reason) == ("target", "INVALID_TARGET")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "target", ["h:1", "[::1]:50051", "dns:///h:1", "unix:/run/it.sock", "ipv4:127.0.0.1:1"]
)
def test_what_grpc_takes_is_taken(connect: Connect, target: str) -> None:
    connect(target)
    with Client(target) as client:
        assert client.target == target


def test_the_address_comes_from_the_environment_unless_it_is_given(
    fake_target: str, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROXYSTASH_TARGET", fake_target)
    with Client() as client:
        client.get("k")
    assert service.calls["Get"] == 1
    with Client("h:1") as client:
        assert client.target == "h:1"
    monkeypatch.setenv("PROXYSTASH_TARGET", "")
    with Client() as client:
        assert client.target == "127.0.0.1:50051"
    monkeypatch.delenv("PROXYSTASH_TARGET")
    with Client() as client:
        assert client.target == "127.0.0.1:50051"


# -- keys


@pytest.fixture
def client(connect: Connect, target: str) -> AnyClient:
    return connect(target, timeout=60)


def test_an_entry_or_a_url_stands_for_its_key(client: AnyClient) -> None:
    entry = CacheEntry("http://h:1", username="ann")
    key = client.put(entry).key
    same: list[str | CacheEntry] = [
        key,
        entry,
        "http://ann@h:1",
        "HTTP://ann:whatever@H:1/",
        CacheEntry("http://other:1", key=key),
    ]
    assert [hit and hit.entry.key for hit in client.get_many(same)] == [key] * 5
    for one in same:
        hit = client.get(one)
        assert hit is not None
        client.update(one, source="s")
        assert client.invalidate_by_health(one).found
        assert client.delete(one)
        client.unban(one)
        client.put(entry)


def test_a_key_of_ones_own_may_look_like_a_url_but_be_none(client: AnyClient) -> None:
    own = "shop://proxy/7"
    client.put(CacheEntry("http://h:1", key=own))
    assert client.get(own) is not None
    with pytest.raises(InvalidArgumentError, match="a proxy URL cannot be a key") as refused:
        client.put(CacheEntry("http://h:1", key="http://h:1"))
    assert refused.value.field == "key"


def test_a_url_with_credentials_can_be_given_to_others() -> None:
    entry = CacheEntry("socks5://h:1", username="a:b@c", password="p/w%ü")
    assert entry.url() == "socks5://h:1"
    parts = urlsplit(entry.url(with_credentials=True))
    assert (unquote(parts.username or ""), unquote(parts.password or "")) == ("a:b@c", "p/w%ü")
    assert (parts.scheme, parts.hostname, parts.port) == ("socks5", "h", 1)
    assert CacheEntry("http://h:1", username="u").url(with_credentials=True) == "http://u@h:1"
    assert CacheEntry("http://h:1", password="p").url(with_credentials=True) == "http://:p@h:1"


def test_the_package_says_its_version_without_loading_grpc() -> None:
    code = "import proxystash, sys; print(proxystash.__version__, 'grpc' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert told.split() == [proxystash.__version__, "False"]
    assert proxystash.__version__[0].isdigit()


# -- event loops


def test_a_client_of_another_loop_says_so(fake_target: str) -> None:
    client = AsyncClient(fake_target)

    async def get() -> None:
        await client.get("k")

    with asyncio.Runner() as first:
        first.run(get())
        with (
            pytest.raises(FailedPreconditionError, match="another event loop") as refused,
            asyncio.Runner() as other,
        ):
            other.run(get())
        assert refused.value.reason == "OTHER_EVENT_LOOP"
        first.run(client.close())


def test_a_call_that_is_cancelled_at_its_deadline_exceeded_that(fake_target: str) -> None:
    """Which of the two grpcio says at that moment depends on who is first."""

    class Cancelled:
        async def __call__(self, _request: object, timeout: float) -> None:  # noqa: ASYNC109 -- grpcio's
            await asyncio.sleep(timeout)
            metadata = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, metadata, metadata, details="Cancelled")

    async def get() -> None:
        async with AsyncClient(fake_target, timeout=0.05) as client:
            client._stub.Get = Cancelled()  # type: ignore[assignment]
            await client.get("k")

    with pytest.raises(DeadlineExceededError):
        asyncio.run(get())
