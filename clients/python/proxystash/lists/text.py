"""Lists of lines: an address on each, alone or beside columns and comments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from proxystash.lists.addresses import Address, read_address
from proxystash.lists.outcomes import FoundRecords, Line, Record, Rejected, UnusableRecordError, is_damaged
from proxystash.lists.rows import split_row
from proxystash.lists.sections import Section
from proxystash.lists.words import are_schemes, country_code, is_fact
from proxystash.proxies import is_ipv6

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# A line that is one address and nothing else, as most are.
_USUAL = re.compile(r"[A-Za-z0-9.-]+:[0-9]{1,5}")
# What proxybroker prints: <Proxy US 0.40s [HTTP: Anonymous, HTTPS] 192.0.2.1:80>
_PROXYBROKER = re.compile(r"<Proxy\s+(\S+)\s+\S+\s+\[([^\]]*)\]\s+(\S+)>")
# What spys.me has behind the address: CO-N-S!
_SPYS = re.compile(r"([A-Z]{2})-[NAH](?:-S)?!?")
_COMMENT = re.compile(r"\s(?:#|//)(.*)")
_BULLET = re.compile(r"[-*•]\s+")
_SEPARATOR = re.compile(r"\s*[|,;\t]\s*|\s+")
_NUMBER = re.compile(r"[+-]?[0-9]+(?:[.:][0-9]+)*\s*(?:%|ms|s|sec|kb/s|mb/s)?|[+!✓✗-]", re.IGNORECASE)
# A column that is meant as an address, rightly or not.
_ADDRESS_LIKE = re.compile(
    r"[0-9]+(?:\.[0-9]+){3}:[0-9]|\[[0-9a-fA-F:.]+\]:[0-9]|[a-z0-9]+://", re.IGNORECASE
)
_QUOTES: Final = "\"'`"
_TWO_ENDS: Final = (
    "it can be read in two ways: the password ends at the separator, or has it in it; --format decides"
)
_SHAPE_HINT: Final = (
    "what follows the port may be credentials or something else: --format host:port:user:pass or host:port "
    "decides"
)


def read_lines(lines: Iterable[Line], shape: str | None) -> FoundRecords:
    """The records of a list of lines: all but blank lines, comments and headers are one, or several."""
    section = Section()
    for where, line in lines:
        if isinstance(line, Rejected):
            yield where, line, None
            continue
        text = line.strip()
        if _USUAL.fullmatch(text):
            yield where, {"proxy_url": text}, section.default
        elif text and not section.read(text):
            for record in read_line(where, text, shape):
                yield where, record, section.default


def read_line(where: str, line: str, shape: str | None) -> Iterator[Record | Rejected]:
    """The records that a line is, or why it is none."""
    try:
        yield from _records(line, shape)
    except UnusableRecordError as error:
        yield Rejected(where, "not UTF-8", "failed") if is_damaged(line) else Rejected.of(where, error)


def is_proxy(line: str, shape: str | None) -> bool:
    """Whether a line names a proxy."""
    for record in read_line("", line.strip(), shape):
        try:
            return not isinstance(record, Rejected) and ("host" in record or _reads(record, shape))
        except UnusableRecordError:
            pass
    return False


def _reads(record: Record, shape: str | None) -> bool:
    return bool(read_address(str(record["proxy_url"]), shape))


def _records(line: str, shape: str | None) -> list[Record]:
    printed = _PROXYBROKER.fullmatch(line)
    if printed:
        types = [part.partition(": ")[0] for part in printed[2].split(",")]
        return [{"proxy_url": printed[3], "protocol": " ".join(types), "country_code": printed[1]}]
    comment = _COMMENT.search(line)
    words = _SEPARATOR.split(comment[1].strip()) if comment else []
    given = _BULLET.sub("", line[: comment.start()] if comment else line, count=1).strip()
    text = given.rstrip(" \t,;|")
    if not text:
        raise UnusableRecordError("no address of a proxy in it")
    columns = _columns(text)
    if len(columns) == 1:
        if text != given and shape is None and columns[0] == text and _ends_with_password(text):
            raise UnusableRecordError(_TWO_ENDS)
        return [_with_facts({"proxy_url": columns[0]}, words, "")]
    if _CONTROL.search(text):
        raise UnusableRecordError("it contains a control character")
    return _records_of_columns(text, columns, words, shape)


def _columns(text: str) -> list[str]:
    """What stands between blanks, tabs, commas, semicolons or bars; or between quotes."""
    if text[0] in _QUOTES:
        inner = text[1:-1].strip()
        if text[0] == text[-1] and inner and text.count(text[0]) == 2:
            return _columns(inner)
        for separator in ",;\t|":
            cells = split_row(text, separator).cells
            if len(cells) > 1:
                return [cell.strip() for cell in cells]
    return _SEPARATOR.split(text)


def _records_of_columns(text: str, columns: list[str], words: list[str], shape: str | None) -> list[Record]:
    """The address is in one column, or in two next to each other; the others tell by their form."""
    places = [place for number in range(len(columns)) if (place := _address_at(columns, number, shape))]
    leading = [place for place in places if all(map(are_schemes, columns[: place.first]))][:1]
    whole = _whole(text, shape)
    if whole is not None and (shape is not None or not leading):
        return [{"proxy_url": text}]
    if whole is not None and whole.has_ip >= leading[0].address.has_ip:
        raise UnusableRecordError(_TWO_ENDS)
    if sum(_ADDRESS_LIKE.match(column) is not None for column in columns) > 1:
        if not all(":" in column for column in columns if column):
            raise UnusableRecordError("it names several addresses")
        return [{"proxy_url": column} for column in columns if column]
    place = _chosen(leading, places, columns)
    before, after = columns[: place.first], columns[place.first + place.width :]
    address = columns[place.first + place.width - 1]
    if after and shape is None and place.address.ends_with_password and f"{address} " in text:
        raise UnusableRecordError(_TWO_ENDS)
    record: dict[str, object] = {"proxy_url": address}
    if place.width == 2:
        record = {"host": columns[place.first], "port": address}
    if not place.address.username and _may_be_credentials(text, address, after, place.width):
        if shape is None:
            raise UnusableRecordError(_SHAPE_HINT)
        if shape == "host:port:user:pass":
            record |= {"username": after[0], "password": after[1]}
            after = []
    return [_with_facts(record, [*before, *after, *words], after[0] if after else "")]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the columns an address is."""

    first: int
    width: int
    address: Address


def _chosen(leading: list[_Place], places: list[_Place], columns: list[str]) -> _Place:
    """The first column, if the address can be there; else the only one that holds an IP address."""
    with_ip = [place for place in places if place.address.has_ip]
    candidates = leading or with_ip
    if not candidates:
        raise UnusableRecordError(_why_not(columns[0]))
    if len({place.address.location for place in with_ip + candidates}) > 1:
        raise UnusableRecordError("it names several addresses")
    return candidates[0]


def _may_be_credentials(text: str, address: str, after: list[str], width: int) -> bool:
    """Whether what follows the port, in columns of its own, may be username and password."""
    if len(after) != 2 or any(map(_is_known, after)):
        return False
    separators = {text[text.index(address) + len(address) :][:1], text[: text.rindex(after[1])][-1:]}
    # Words between blanks behind host:port are a remark.
    return width == 2 or " " not in separators


def _address_at(columns: list[str], number: int, shape: str | None) -> _Place | None:
    text = columns[number]
    try:
        if ":" in text and not is_ipv6(text):
            address = read_address(text, shape)
            host = address.location.rpartition(":")[0]
            # A word with a number, such as Total:12, is no address beside other words.
            certain = (
                address.scheme or address.username or address.has_ip or "." in host or host == "localhost"
            )
            return _Place(number, 1, address) if certain else None
        port = columns[number + 1] if number + 1 < len(columns) else ""
        if port.isascii() and port.isdigit() and ("." in text or is_ipv6(text) or text == "localhost"):
            host = f"[{text}]" if is_ipv6(text) else text
            return _Place(number, 2, read_address(f"{host}:{port}"))
    except UnusableRecordError:
        pass
    return None


def _whole(text: str, shape: str | None) -> Address | None:
    """The text as one address that has the separators in its credentials."""
    if any(char.isspace() for char in text) or ("@" not in text and text.count(":") < 3):
        return None
    try:
        address = read_address(text, shape)
    except UnusableRecordError:
        return None
    return address if address.username or address.password else None


def _ends_with_password(text: str) -> bool:
    try:
        return read_address(text).ends_with_password
    except UnusableRecordError:
        return False


def _why_not(column: str) -> str:
    try:
        read_address(column)
    except UnusableRecordError as error:
        if ":" in column:
            return str(error)
    return "no address of a proxy in it"


def _is_known(word: str) -> bool:
    return not word or is_fact(word) or are_schemes(word) or _NUMBER.fullmatch(word) is not None


def _with_facts(record: Record, words: list[str], beside: str) -> Record:
    """Add what words beside the address say for certain: the scheme, and a country right behind it."""
    named = [word for word in words if word and are_schemes(word)]
    if named:
        record = {**record, "protocol": " ".join(named)}
    spys = _SPYS.fullmatch(beside)
    country = spys[1] if spys else beside
    # NO is as likely an answer as Norway.
    if country.isupper() and country_code(country) and country != "NO":
        record = {**record, "country_code": country}
    return record
