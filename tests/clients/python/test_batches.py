"""Many keys and entries cut into requests."""

from __future__ import annotations

from proxystash import CacheEntry, EntryError, PutResult
from proxystash._batches import MAX_BYTES, batches, put_batches

LIMIT = 4 * 1024 * 1024


def entry(port: int, password_size: int = 0) -> CacheEntry:
    return CacheEntry(f"http://h:{port}", password="p" * password_size)


def test_keys_go_a_thousand_at_a_time_with_the_position_of_the_first() -> None:
    found = list(batches(str(number) for number in range(2500)))

    assert [(start, len(keys)) for start, keys in found] == [(0, 1000), (1000, 1000), (2000, 500)]
    assert [key for _, keys in found for key in keys] == [str(number) for number in range(2500)]


def test_no_entries_make_no_request() -> None:
    assert list(put_batches([])) == []
    assert list(batches([])) == []


def test_entries_go_a_thousand_at_a_time() -> None:
    batches = list(put_batches(entry(port) for port in range(1, 2001)))

    assert [len(batch.request.entries) for batch in batches] == [1000, 1000]


def test_no_request_is_larger_than_a_message_may_be() -> None:
    sizes = [1_000_000, 2_000_000, 1_100_000, 90_000, 3_000_000, MAX_BYTES - 100, 10]

    batches = list(put_batches(entry(port, size) for port, size in enumerate(sizes, 1)))

    assert [len(batch.request.entries) for batch in batches] == [4, 1, 2]
    assert all(batch.request.ByteSize() <= LIMIT for batch in batches)
    sent = [len(message.password) for batch in batches for message in batch.request.entries]
    assert sent == sizes


def test_entries_are_taken_only_as_requests_need_them() -> None:
    taken = []

    def entries() -> object:
        for port in range(1, 5000):
            taken.append(port)
            yield entry(port)

    next(put_batches(entries()))  # type: ignore[arg-type]  # a generator of entries

    assert len(taken) == 1001


def test_what_cannot_be_sent_is_refused_in_its_place() -> None:
    given = [entry(1), entry(2, LIMIT), CacheEntry("http://h:3", source=5), entry(4)]  # type: ignore[arg-type]

    (batch,) = put_batches(given)

    assert [message.proxy_url for message in batch.request.entries] == ["http://h:1", "http://h:4"]
    stored = [PutResult(key, None, ()) for key in ("first", "fourth")]  # type: ignore[arg-type]  # needs no time
    first, too_large, invalid, fourth = batch.merge([*stored])
    assert [first, fourth] == stored
    assert isinstance(too_large, EntryError)
    assert (too_large.code, too_large.reason) == ("INVALID_ARGUMENT", "ENTRY_TOO_LARGE")
    assert isinstance(invalid, EntryError)
    assert (invalid.reason, invalid.field) == ("INVALID_SOURCE", "source")


def test_thousands_of_refused_entries_keep_their_places() -> None:
    given = [CacheEntry("http://h:1", source=5)] * 2500  # type: ignore[arg-type]  # what is tested

    batches = list(put_batches(given))

    assert [len(batch.merge([])) for batch in batches] == [1000, 1000, 500]
