"""Made-up proxies as messages, and the files of requests that the load generators send."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from proxystash.v1 import cache_service_pb2 as pb
from tests.benchmarks.made_up import SOURCE, labels_of, proxy_url


def entry_message(number: int) -> pb.CacheEntry:
    """A made-up proxy, without credentials."""
    return pb.CacheEntry(proxy_url=proxy_url(number), source=SOURCE, labels=labels_of(number))


def entry_json(number: int) -> dict[str, Any]:
    """The same, as ghz reads it."""
    return {"proxy_url": proxy_url(number), "source": SOURCE, "labels": labels_of(number)}


def write_framed(path: Path, message: Message) -> Path:
    """A file with the message as it goes over the wire: uncompressed, its length, its bytes."""
    data = message.SerializeToString()
    path.write_bytes(b"\0" + struct.pack(">I", len(data)) + data)
    return path


def write_requests(path: Path, requests: Iterable[dict[str, Any]]) -> Path:
    """A file of requests that ghz sends one after the other."""
    path.write_text(json.dumps(list(requests)))
    return path


def write_puts(path: Path, count: int, first: int = 0) -> Path:
    """`count` Puts of distinct proxies."""
    return write_requests(path, ({"entry": entry_json(number)} for number in range(first, first + count)))


def write_batch_puts(path: Path, batches: int, size: int) -> Path:
    """`batches` BatchPuts of `size` proxies each, all distinct."""
    return write_requests(
        path,
        (
            {"entries": [entry_json(number) for number in range(first, first + size)]}
            for first in range(0, batches * size, size)
        ),
    )
