"""Sealing and opening of credentials, and where the key comes from."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from pydantic import SecretStr

from proxystash_server.cache.errors import EncryptionKeyError
from proxystash_server.cache.ground.files import make_directory, open_anew
from proxystash_server.cache.ground.killpoints import kill_point
from proxystash_server.cache.ground.parsing import UNREADABLE, parse_json

KEY_VARIABLE = "PROXYSTASH_ENCRYPTION_KEY"
_KEY_COMMAND = 'python -c "from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())"'
_CHECK_TEXT = b"proxystash"
_CHECKSUM_LENGTH = len("~0123456789")


class UnreadableCredentialsError(ValueError):
    """A sealed credential that no key at hand can open: the record is corrupt, the tier is not at fault."""


class CredentialEncryptor:
    """Seals an entry's username and password into one token and opens it again.

    Fernet (AES-128-CBC with an HMAC) from `cryptography`; the first key seals, all of them open. Thread-safe.
    Raises EncryptionKeyError for a malformed key, without quoting it.
    """

    def __init__(self, key: bytes | None = None, previous_keys: Sequence[bytes] = ()) -> None:
        self.key = Fernet.generate_key() if key is None else key
        self._cipher = MultiFernet(
            [
                _fernet(candidate, f"previous encryption key number {place}" if place else "encryption key")
                for place, candidate in enumerate((self.key, *previous_keys))
            ]
        )

    def encrypt(self, secret: SecretStr) -> bytes:
        """Seal one secret; an empty one gives empty bytes."""
        plain = secret.get_secret_value()
        return self._cipher.encrypt(plain.encode()) if plain else b""

    def decrypt(self, encrypted: bytes) -> SecretStr:
        """Open what `encrypt` made; raises UnreadableCredentialsError."""
        return SecretStr(self._open(encrypted).decode() if encrypted else "")

    def seal(self, username: SecretStr | None, password: SecretStr | None) -> bytes | None:
        """One token for both credentials, None where there are none."""
        if username is None and password is None:
            return None
        pair = [None if secret is None else secret.get_secret_value() for secret in (username, password)]
        return self._cipher.encrypt(json.dumps(pair).encode())

    def open(self, token: bytes | None) -> tuple[str | None, str | None]:
        """Username and password out of a token of `seal`; raises UnreadableCredentialsError."""
        if token is None:
            return None, None
        try:
            username, password = parse_json(self._open(token))
        except UNREADABLE as error:
            raise UnreadableCredentialsError(str(error)) from None
        return username, password

    def make_check(self) -> bytes:
        """A token that a store keeps so as to recognize its key again."""
        return with_checksum(self._cipher.encrypt(_CHECK_TEXT))

    def passes_check(self, token: bytes) -> bool:
        """Whether the keys at hand open what this check token stands for.

        That takes the key that made it, or every key of `make_joint_check`.
        """
        try:
            text = self._open(_without_checksum(token))
            while text != _CHECK_TEXT:
                text = self._open(text)
        except UnreadableCredentialsError:
            return False
        return True

    def may_go_on(self, check: bytes | None, sealed: Iterable[str]) -> bool:
        """Whether a store with this check token may be opened, of whose credentials `sealed` are some.

        They decide where the token is missing or damaged: then one of them must open, if there are any.
        """
        if check is not None and not is_damaged_check(check):
            return self.passes_check(check)
        found = False
        for token in sealed:
            found = True
            try:
                self.open(token.encode())
            except ValueError:
                continue
            return True
        return not found

    def _open(self, token: bytes) -> bytes:
        try:
            return self._cipher.decrypt(token)
        except InvalidToken:
            raise UnreadableCredentialsError(
                "the token was sealed under another key, or is damaged"
            ) from None


def make_joint_check(keys: Sequence[bytes]) -> bytes:
    """A check token that is passed with all of `keys` only.

    A store carries it while some of its credentials are sealed under one of them and some under another.
    """
    token = _CHECK_TEXT
    for key in reversed(keys):
        token = Fernet(key).encrypt(token)
    return with_checksum(token)


def with_checksum(check: bytes) -> bytes:
    """A check token by which a damaged one can be told from one of another key.

    Earlier releases wrote it without a checksum; the lengths of the two are never a bit apart.
    """
    bare = _without_checksum(check)
    return b"%b~%010d" % (bare, zlib.crc32(bare))


def is_damaged_check(check: bytes) -> bool:
    """Whether a check token is known to be damaged."""
    return len(check) % 4 != 0 and with_checksum(check) != check


def _without_checksum(check: bytes) -> bytes:
    return check[:-_CHECKSUM_LENGTH] if len(check) % 4 else check


def keys_of_check(token: bytes, keys: Sequence[bytes]) -> set[bytes]:
    """Those of `keys` that it takes to pass a check token; none if it cannot be passed with them."""
    used: set[bytes] = set()
    token = _without_checksum(token)
    while token != _CHECK_TEXT:
        for key in keys:
            try:
                token = Fernet(key).decrypt(token)
            except InvalidToken:
                continue
            used.add(key)
            break
        else:
            return set()
    return used


def _fernet(key: bytes, name: str) -> Fernet:
    try:
        return Fernet(key)
    except ValueError:
        raise EncryptionKeyError(
            f"the {name} is malformed: it must be 32 bytes in URL-safe base64. Make one with: {_KEY_COMMAND}"
        ) from None


def read_key_file(path: Path) -> list[bytes] | None:
    """The keys in `path`, one a line, None if there is no such file. The first seals, all of them open.

    There are several only while `rotate-key` is under way. Raises EncryptionKeyError if others may read the
    file, or if what it holds is no key.
    """
    try:
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise EncryptionKeyError(
                f"{path} may be read by others (mode {mode:04o}). Make it private first: chmod 600 {path}"
            )
        keys = path.read_bytes().split()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EncryptionKeyError(f"{path} cannot be read: {error.strerror}") from None
    if not keys:
        raise EncryptionKeyError(
            f"{path} is empty. Put the key back; if there are no credentials yet, delete the file"
        )
    for number, key in enumerate(keys, start=1):
        _fernet(key, f"key in line {number} of {path}")
    return keys


def create_key_file(path: Path, key: bytes) -> None:
    """Write `key` to a new file that only its owner may read, and sync it; raises EncryptionKeyError.

    The file appears whole or not at all, and replaces none.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        make_directory(path.parent, sync=True)
        with os.fdopen(open_anew(temporary), "wb") as file:
            file.write(key + b"\n")
            file.flush()
            os.fsync(file.fileno())
        kill_point("key.before_link")
        path.hardlink_to(temporary)
        temporary.unlink()
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise EncryptionKeyError(f"{path} cannot be created: {error.strerror}") from None
