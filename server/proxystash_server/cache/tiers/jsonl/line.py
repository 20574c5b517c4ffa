"""A line: a JSON object whose last field, `crc`, is the CRC-32 of everything before it."""

from __future__ import annotations

import json
import zlib
from typing import Any

from proxystash_server.cache.ground.parsing import parse_json

_CRC_FIELD = b',"crc":"'
_CRC_LENGTH = len(_CRC_FIELD) + len('00000000"}')

# `json.dumps` with these settings would make an encoder for each record.
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


def encode_body(record: dict[str, Any]) -> bytes:
    """A record as the beginning of a line, up to where `finish_line` goes on."""
    return _encode(record).encode()[:-1]


def finish_line(body: bytes, sequence: int) -> bytes:
    """The whole line, with its number and its checksum."""
    line = b'%b,"seq":%d' % (body, sequence)
    return b'%b%b%08x"}\n' % (line, _CRC_FIELD, zlib.crc32(line))


def decode_line(line: bytes) -> dict[str, Any]:
    """The record of a line; raises ValueError if the line is damaged."""
    if not is_sound(line):
        raise ValueError("the line is damaged")
    record: dict[str, Any] = parse_json(line)
    return record


def is_sound(line: bytes) -> bool:
    """Whether a line is as it was written."""
    start = len(line) - 1 - _CRC_LENGTH
    if start < 0 or line[start : start + len(_CRC_FIELD)] != _CRC_FIELD or not line.endswith(b'"}\n'):
        return False
    return b"%08x" % zlib.crc32(line[:start]) == line[-11:-3]
