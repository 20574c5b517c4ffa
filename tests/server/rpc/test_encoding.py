"""Answers assembled from serialized pieces are the messages that filling them field by field makes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxystash.models import HealthMonitoring, HealthStatus
from proxystash.v1 import cache_service_pb2 as pb
from proxystash_server.cache import CacheEntry, CacheTierType, Lookup, Lookups, Stored
from proxystash_server.cache.entry.entry import to_datetime, with_use
from proxystash_server.rpc import convert, encoding
from proxystash_server.rpc.errors import NO_TIER_AVAILABLE

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=40)
MOMENTS = st.integers(0, 2**57).map(to_datetime)


@st.composite
def entries(draw: st.DrawFn) -> CacheEntry:
    entry = CacheEntry(
        key=draw(st.text("abcdef0123456789", min_size=1, max_size=200)),
        proxy_url="http://192.0.2.1:8080",
        source=draw(WORDS),
        fetch_time=draw(MOMENTS),
        ttl_seconds=draw(st.integers(1, 1_000_000)),
        username=draw(st.none() | WORDS),
        password=draw(st.none() | WORDS),
        health_status=draw(st.sampled_from(HealthStatus)),
        failure_count=draw(st.integers(0, 5)),
        health_monitoring=draw(st.none() | st.just(HealthMonitoring(total_health_checks=7))),
        # Enough of them make a message whose length needs three bytes.
        labels=draw(st.dictionaries(WORDS.filter(bool), WORDS, max_size=5))
        | {str(number): "x" * 256 for number in range(draw(st.sampled_from([0, 0, 3, 27])))},
    )
    count = draw(st.integers(1, 130) | st.integers(16_380, 16_390) | st.integers(1, 2**58))
    return with_use(entry, count, draw(st.integers(0, 2**57)), draw(st.booleans()))


LOOKUPS = st.tuples(entries(), st.sampled_from(CacheTierType)).map(lambda found: Lookup(*found))


def filled(lookup: Lookup) -> pb.GetResponse:
    response = pb.GetResponse()
    if lookup.entry is not None and lookup.served_by is not None:
        convert.fill_entry(response.entry, lookup.entry)
        response.served_by = convert.tier_number(lookup.served_by)
    return response


@given(LOOKUPS)
def test_an_answer_is_the_message_filled_field_by_field(lookup: Lookup) -> None:
    for _ in ("built", "kept"):
        assert pb.GetResponse.FromString(encoding.get_response(lookup)) == filled(lookup)


@given(st.lists(LOOKUPS | st.just(Lookup(None, None)), max_size=5))
def test_an_answer_to_a_batch_is_the_message_of_its_results(lookups: list[Lookup]) -> None:
    several = Lookups([lookup.entry for lookup in lookups], [lookup.served_by for lookup in lookups])
    expected = pb.BatchGetResponse(results=map(filled, lookups))
    assert pb.BatchGetResponse.FromString(encoding.batch_get_response(several)) == expected


@given(
    st.lists(LOOKUPS | st.just(Lookup(None, None)), max_size=5), st.integers(0, 50_000), st.integers(1, 1000)
)
def test_the_first_results_are_those_that_have_room(lookups: list[Lookup], room: int, left: int) -> None:
    several = Lookups([lookup.entry for lookup in lookups], [lookup.served_by for lookup in lookups])
    results, count = encoding.first_results(several, room)
    answer = pb.BatchGetResponse.FromString(results + encoding.unanswered(left))
    assert answer == pb.BatchGetResponse(results=map(filled, lookups[:count]), unanswered=left)
    assert len(results) <= room
    if count < len(lookups):
        # As it is sent: with fields of a time that are zero, which a message leaves out.
        one_more = Lookups(several.entries[: count + 1], several.served_by[: count + 1])
        assert len(encoding.batch_get_response(one_more)) > room


def test_a_miss_is_an_empty_answer() -> None:
    assert encoding.get_response(Lookup(None, None)) == b""


def test_what_was_serialized_for_one_answer_serves_the_next_of_the_same_write() -> None:
    entry = CacheEntry("key-1", "http://192.0.2.1:1", ttl_seconds=60)
    encoding.get_response(Lookup(entry, CacheTierType.L1))
    kept = entry.encoded
    later = with_use(entry, 9, 9, evicted_from_l1=False)
    encoding.get_response(Lookup(later, CacheTierType.L1))
    assert kept is not None
    assert later.encoded is kept
    assert entry.model_copy(update={"source": "other"}).encoded is None


@given(entries(), st.lists(st.sampled_from(CacheTierType), unique=True))
def test_an_answer_to_a_put_is_the_message_filled_field_by_field(
    entry: CacheEntry, tiers: list[CacheTierType]
) -> None:
    expected = pb.PutResponse(key=entry.key, stored_in=map(convert.tier_number, tiers))
    convert.fill_timestamp(expected.expires_at, entry.expires_at_us)
    assert pb.PutResponse.FromString(encoding.put_response(Stored(tuple(tiers), entry))) == expected


def test_an_answer_to_a_batch_of_puts_keeps_the_order_of_results_and_errors() -> None:
    entry = CacheEntry("key-1", "http://192.0.2.1:1", ttl_seconds=60)
    stored = encoding.put_response(Stored((CacheTierType.L1, CacheTierType.L3), entry))
    answer = pb.BatchPutResponse.FromString(
        encoding.batch_put_response([NO_TIER_AVAILABLE, stored, NO_TIER_AVAILABLE])
    )
    assert [result.WhichOneof("outcome") for result in answer.results] == ["error", "stored", "error"]
    assert answer.results[0].error == NO_TIER_AVAILABLE.to_entry_error()
    assert answer.results[1].stored == pb.PutResponse.FromString(stored)


def test_what_is_kept_serialized_has_no_credentials_in_it() -> None:
    entry = CacheEntry("key-1", "http://192.0.2.1:1", ttl_seconds=60, username="worker-7", password="hunter2")
    answer = encoding.get_response(Lookup(entry, CacheTierType.L1))
    assert pb.GetResponse.FromString(answer).entry.password == "hunter2"
    assert entry.encoded is not None
    assert b"hunter2" not in entry.encoded
    assert b"worker-7" not in entry.encoded
