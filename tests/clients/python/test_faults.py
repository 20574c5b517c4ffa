"""What both clients do when calls fail: what they repeat, what they never repeat, and what they raise."""

from __future__ import annotations

import gc
import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.rpc import error_details_pb2

from proxystash import (
    CacheEntry,
    Client,
    ClientClosedError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ProxystashError,
    ResourceExhaustedError,
    RetryPolicy,
    UnavailableError,
)

from .conftest import AnyClient, Connect
from .fake_service import FakeService, Fault, serving
from .test_proxies import _everything_reachable_from
from .waiting import wait_until

SECRET = "s3cr3t-p4ss"
UNAVAILABLE = Fault(grpc.StatusCode.UNAVAILABLE, "not now")
ENTRY = CacheEntry("http://h:1", username="ann", password=SECRET)
QUICK = RetryPolicy(initial=0.01, multiplier=1, maximum=0.01)

Call = Callable[[AnyClient], object]

REPEATABLE: dict[str, Call] = {
    "Get": lambda client: client.get("k"),
    "BatchGet": lambda client: client.get_many(["k"]),
    "Put": lambda client: client.put(ENTRY),
    "BatchPut": lambda client: client.put_many([ENTRY]),
    "List": lambda client: list(client.list()),
    "GetStats": lambda client: client.stats(),
    "Acquire": lambda client: client.pool.acquire(),
    "Renew": lambda client: client.pool.renew("x"),
    "Release": lambda client: client.pool.release("x"),
    "GetProxyHealth": lambda client: client.pool.health("k"),
    "ListTargets": lambda client: list(client.pool.targets()),
    "ListLeases": lambda client: list(client.pool.leases()),
}
ONCE: dict[str, Call] = {
    "Delete": lambda client: client.delete("k"),
    "Clear": lambda client: client.clear(),
    "InvalidateByHealth": lambda client: client.invalidate_by_health("k"),
    "ReportResults": lambda client: client.pool.report("k", "success"),
    "EndSession": lambda client: client.pool.end_session("s"),
}


@pytest.fixture
def client(connect: Connect, fake_target: str) -> AnyClient:
    return connect(fake_target, retry=QUICK, timeout=20)


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize("method", REPEATABLE)
def test_a_harmless_call_is_repeated_until_the_server_is_available(
    client: AnyClient, service: FakeService, method: str
) -> None:
    service.fail(method, UNAVAILABLE, times=3)

    REPEATABLE[method](client)

    assert service.calls[method] == 4
    assert len({request.SerializeToString() for request in service.requests}) == 1


@pytest.mark.parametrize("method", ONCE)
def test_a_call_that_counts_is_made_once(client: AnyClient, service: FakeService, method: str) -> None:
    service.fail(method, UNAVAILABLE)

    with pytest.raises(UnavailableError, match="not now"):
        ONCE[method](client)

    assert service.calls[method] == 1


@pytest.mark.parametrize("method", [*REPEATABLE, *ONCE])
def test_a_call_that_finds_no_server_waits_for_one(
    connect: Connect, service: FakeService, free_port: int, method: str
) -> None:
    """Given nobody at the address, when a server starts there, then the call happens, and happens once."""
    client = connect(f"127.0.0.1:{free_port}", retry=QUICK, timeout=30)
    refused = threading.Event()
    started: list[Any] = []

    def start_when_refused() -> None:
        refused.wait(30)
        started.append(serving(service, f"127.0.0.1:{free_port}"))
        started[0].__enter__()

    starter = threading.Thread(target=start_when_refused)
    starter.start()
    with Client(f"127.0.0.1:{free_port}", retry=None) as probe, pytest.raises(UnavailableError):
        probe.stats()
    refused.set()
    try:
        (REPEATABLE | ONCE)[method](client)
    finally:
        starter.join()
        started[0].__exit__(None, None, None)

    assert service.calls[method] == 1


@pytest.mark.parametrize("method", [*REPEATABLE, *ONCE])
def test_a_call_that_finds_no_server_until_its_deadline_says_so(
    connect: Connect, free_port: int, method: str
) -> None:
    client = connect(f"127.0.0.1:{free_port}", timeout=0.3)

    with pytest.raises(UnavailableError, match="Connection refused") as caught:
        (REPEATABLE | ONCE)[method](client)

    assert str(caught.value) == f"cannot reach 127.0.0.1:{free_port} (Connection refused)"
    assert (caught.value.code, caught.value.sent) == ("UNAVAILABLE", False)


def test_an_address_that_does_not_exist_cannot_be_reached(connect: Connect) -> None:
    with pytest.raises(UnavailableError, match=r"cannot reach nobody\.invalid:1") as caught:
        connect("nobody.invalid:1", retry=None).get("k")

    assert not caught.value.sent


def test_without_a_retry_policy_nothing_is_repeated(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    service.fail("Get", UNAVAILABLE)

    with pytest.raises(UnavailableError) as caught:
        connect(fake_target, retry=None).get("k")

    assert service.calls["Get"] == 1
    assert caught.value.sent


@pytest.mark.parametrize("timeout", [0.2, 0.4])
def test_no_call_takes_longer_than_its_deadline(
    client: AnyClient, service: FakeService, timeout: float
) -> None:
    service.hanging |= {"Get", "Delete"}

    for call in (client.get, client.delete):
        with pytest.raises(DeadlineExceededError, match=rf"no answer from .* within {timeout} s") as caught:
            call("k", timeout=timeout)
        assert caught.value.code == caught.value.reason == "DEADLINE_EXCEEDED"

    assert all(0 < left < timeout + 0.1 for left in service.deadlines)


def test_repetitions_share_one_deadline(client: AnyClient, service: FakeService) -> None:
    """Given a server that stays unavailable, then each repetition has less time, and that is what is told."""
    service.fail("Get", UNAVAILABLE, times=10_000)

    with pytest.raises(UnavailableError, match="not now"):
        client.get("k", timeout=0.6)

    assert service.calls["Get"] > 1
    assert service.deadlines[-1] < 0.3 < service.deadlines[0] < 0.7


def test_every_call_has_the_clients_deadline_unless_it_brings_its_own(
    connect: Connect, service: FakeService, fake_target: str
) -> None:
    client = connect(fake_target, timeout=50)

    for call in (REPEATABLE | ONCE).values():
        call(client)

    assert len(service.deadlines) == len(REPEATABLE | ONCE)
    assert all(40 < left < 51 for left in service.deadlines)


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_what_is_no_deadline_is_refused(connect: Connect, fake_target: str, timeout: float) -> None:
    with pytest.raises(ValueError, match="greater than zero"):
        connect(fake_target, timeout=timeout)
    with pytest.raises(ValueError, match="greater than zero"):
        connect(fake_target).get("k", timeout=timeout)


def test_the_servers_reason_and_field_reach_the_caller(client: AnyClient, service: FakeService) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="entry.proxy_url", description="no port")
    service.fail(
        "Put",
        Fault(
            grpc.StatusCode.INVALID_ARGUMENT,
            "no port",
            [
                error_details_pb2.RetryInfo(),
                error_details_pb2.ErrorInfo(reason="INVALID_PROXY_URL", domain="proxystash"),
                error_details_pb2.ErrorInfo(reason="SOMETHING", domain="elsewhere.example"),
                error_details_pb2.BadRequest(field_violations=[violation]),
            ],
        ),
    )

    with pytest.raises(InvalidArgumentError) as caught:
        client.put(ENTRY)

    error = caught.value
    assert (error.code, error.reason, error.field) == ("INVALID_ARGUMENT", "INVALID_PROXY_URL", "proxy_url")
    assert str(error) == error.message == "no port"


def test_an_item_at_fault_is_named_by_its_position_among_all(client: AnyClient, service: FakeService) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="keys[7]", description="empty")
    details = [error_details_pb2.BadRequest(field_violations=[violation])]
    service.fail("BatchGet", Fault(grpc.StatusCode.INVALID_ARGUMENT, "empty", details), after=1)

    with pytest.raises(InvalidArgumentError) as caught:
        client.get_many(str(number) for number in range(2000))

    assert caught.value.field == "keys[1007]"


def test_what_an_answer_has_no_room_for_is_asked_for_again(client: AnyClient, service: FakeService) -> None:
    service.most_results = 300
    keys = [client.put(CacheEntry(f"http://h:{port}")).key for port in range(1, 1101)]
    service.calls.clear()

    hits = client.get_many(keys)

    assert [hit and hit.entry.key for hit in hits] == keys
    assert service.calls["BatchGet"] == 5


def test_a_fault_in_what_is_asked_for_again_is_named_by_its_position(
    client: AnyClient, service: FakeService
) -> None:
    service.most_results = 300
    violation = error_details_pb2.BadRequest.FieldViolation(field="keys[7]", description="empty")
    details = [error_details_pb2.BadRequest(field_violations=[violation])]
    service.fail("BatchGet", Fault(grpc.StatusCode.INVALID_ARGUMENT, "empty", details), after=5)

    with pytest.raises(InvalidArgumentError) as caught:
        client.get_many(str(number) for number in range(2000))

    # One thousand took four calls, the fifth answered 300.
    assert caught.value.field == "keys[1307]"


def test_a_server_that_answers_no_key_is_not_asked_for_ever(client: AnyClient, service: FakeService) -> None:
    service.most_results = 0

    with pytest.raises(InternalError, match="answered none of the keys"):
        client.get_many(["k"])

    assert service.calls["BatchGet"] == 1


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidArgumentError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhaustedError),
        (grpc.StatusCode.INTERNAL, InternalError),
        (grpc.StatusCode.UNIMPLEMENTED, ProxystashError),
    ],
)
def test_each_status_has_its_exception(
    client: AnyClient, service: FakeService, code: grpc.StatusCode, kind: type[ProxystashError]
) -> None:
    service.fail("Get", Fault(code))

    with pytest.raises(ProxystashError) as caught:
        client.get("k")

    assert type(caught.value) is kind
    assert (caught.value.code, caught.value.reason, caught.value.field) == (code.name, code.name, "")
    assert service.calls["Get"] == 1


def test_an_internal_error_carries_the_request_id(client: AnyClient, service: FakeService) -> None:
    service.fail(
        "Get", Fault(grpc.StatusCode.INTERNAL, "oh", [error_details_pb2.RequestInfo(request_id="0af3")])
    )

    with pytest.raises(InternalError) as caught:
        client.get("k")

    assert caught.value.request_id == "0af3"


def test_no_exception_holds_a_credential(client: AnyClient, service: FakeService) -> None:
    service.fail("Put", Fault(grpc.StatusCode.INTERNAL))

    with pytest.raises(InternalError) as caught:
        client.put(CacheEntry(f"http://ann:{SECRET}@h:1", password=SECRET))

    assert SECRET not in repr(_everything_reachable_from(caught.value))


def test_a_closed_client_makes_no_calls(client: AnyClient, service: FakeService) -> None:
    client.close()
    client.close()

    for call in (REPEATABLE | ONCE).values():
        with pytest.raises(ClientClosedError):
            call(client)
    with pytest.raises(ClientClosedError):
        client.stream_stats()
    assert not service.calls


def test_closing_ends_a_call_that_waits(service: FakeService, fake_target: str) -> None:
    service.hanging.add("Get")
    client = Client(fake_target, timeout=60)
    caught: list[BaseException] = []

    def get() -> None:
        try:
            client.get("k")
        except ProxystashError as error:
            caught.append(error)

    thread = threading.Thread(target=get)
    thread.start()
    wait_until(lambda: service.calls["Get"] == 1)
    client.close()
    thread.join(30)

    assert [type(error) for error in caught] == [ClientClosedError]


def test_closing_ends_a_pause_between_repetitions(free_port: int) -> None:
    client = Client(f"127.0.0.1:{free_port}", timeout=600, retry=RetryPolicy(500, 1, 500))
    caught: list[BaseException] = []

    def get() -> None:
        try:
            client.get("k")
        except ProxystashError as error:
            caught.append(error)

    thread = threading.Thread(target=get)
    thread.start()
    client.close()
    thread.join(30)

    assert [type(error) for error in caught] == [ClientClosedError]


def test_a_client_leaves_nothing_behind(service: FakeService, fake_target: str) -> None:
    """Given many clients, each used and closed, then no thread of theirs is left."""
    before = threading.active_count()
    for _ in range(20):
        with Client(fake_target) as client:
            client.get("k")
    gc.collect()

    assert threading.active_count() <= before + 1


def test_a_channel_can_be_secure(connect: Connect, service: FakeService) -> None:
    key, certificate = self_signed("localhost")
    server_credentials = grpc.ssl_server_credentials([(key, certificate)])
    with serving(service, credentials=server_credentials) as address:
        target = address.replace("127.0.0.1", "localhost")

        assert connect(target, credentials=grpc.ssl_channel_credentials(certificate)).get("k") is None
        with pytest.raises(UnavailableError):
            connect(target, credentials=grpc.ssl_channel_credentials(), retry=None).get("k")


def self_signed(name: str) -> tuple[bytes, bytes]:
    """A private key and its certificate, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, certificate.public_bytes(serialization.Encoding.PEM)


def test_a_client_says_where_it_goes(fake_target: str) -> None:
    with Client(fake_target) as client:
        assert repr(client) == f"Client('{fake_target}')"
