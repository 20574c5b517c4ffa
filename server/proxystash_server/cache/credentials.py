"""Sealing and opening of credentials, and where the key comes from."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from pydantic import SecretStr

from proxystash_server.cache.errors import EncryptionKeyError

KEY_VARIABLE = "PROXYSTASH_ENCRYPTION_KEY"
_KEY_COMMAND = 'python -c "from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())"'
_CHECK_TEXT = b"proxystash"


class UnreadableCredentialsError(ValueError):
    """A sealed credential that no key at hand can open: the record is corrupt, the tier is not at fault."""


class CredentialEncryptor:
    """Seals an entry's username and password into one token and opens it again.

    Fernet (AES-128-CBC with an HMAC) from `cryptography`; the first key seals, all of them open. Thread-safe.
    Raises EncryptionKeyError for a malformed key, without quoting it.
    """

    def __init__(self, key: bytes | None = None, previous_keys: Sequence[bytes] = ()) -> None:
        self.key = Fernet.generate_key() if key is None else key
        fernets = []
        for place, candidate in enumerate((self.key, *previous_keys)):
            try:
                fernets.append(Fernet(candidate))
            except ValueError:
                which = "encryption key" if place == 0 else f"previous encryption key number {place}"
                raise EncryptionKeyError(
                    f"the {which} is malformed: it must be 32 bytes in URL-safe base64. "
                    f"Make one with: {_KEY_COMMAND}"
                ) from None
        self._cipher = MultiFernet(fernets)

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
            username, password = json.loads(self._open(token))
        except ValueError as error:
            raise UnreadableCredentialsError(str(error)) from None
        return username, password

    def make_check(self) -> bytes:
        """A token that a store keeps so as to recognize its key again."""
        return self._cipher.encrypt(_CHECK_TEXT)

    def passes_check(self, token: bytes) -> bool:
        """Whether one of the keys at hand made this check token."""
        try:
            return self._open(token) == _CHECK_TEXT
        except UnreadableCredentialsError:
            return False

    def _open(self, token: bytes) -> bytes:
        try:
            return self._cipher.decrypt(token)
        except InvalidToken:
            raise UnreadableCredentialsError(
                "the token was sealed under another key, or is damaged"
            ) from None


def read_key_file(path: Path) -> bytes | None:
    """The key in `path`, None if there is no such file.

    Raises EncryptionKeyError where others may read it.
    """
    try:
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise EncryptionKeyError(
                f"{path} may be read by others (mode {mode:04o}). Make it private first: chmod 600 {path}"
            )
        return path.read_bytes().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EncryptionKeyError(f"{path} cannot be read: {error.strerror}") from None


def create_key_file(path: Path, key: bytes) -> None:
    """Write `key` to a new file that only its owner may read, and sync it; raises EncryptionKeyError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key + b"\n")
            file.flush()
            os.fsync(file.fileno())
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise EncryptionKeyError(f"{path} cannot be created: {error.strerror}") from None
