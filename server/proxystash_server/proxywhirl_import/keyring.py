"""proxywhirl's Fernet keys: where they come from, and opening with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

KEY_VARIABLES: Final = ("PROXYWHIRL_CACHE_ENCRYPTION_KEY", "PROXYWHIRL_CACHE_KEY_PREVIOUS")


class KeyringError(Exception):
    """A malformed key, or a file of keys that cannot be read; the message says where, and quotes nothing."""


class SealedError(Exception):
    """A credential that none of the keys opens. The message is for whoever holds the keys."""


class Keyring:
    """Opens what proxywhirl sealed.

    `places` says where each key stood, for the KeyringError that a malformed one raises.
    """

    def __init__(self, keys: Sequence[bytes], places: Sequence[str] = ()) -> None:
        fernets = []
        for number, key in enumerate(keys):
            try:
                fernets.append(Fernet(key))
            except ValueError:
                place = places[number] if number < len(places) else f"key {number + 1}"
                raise KeyringError(f"{place} is no Fernet key: 32 bytes in URL-safe base64") from None
        self._cipher = MultiFernet(fernets) if fernets else None

    def open(self, token: bytes) -> str:
        """The secret that was sealed into `token`; raises SealedError."""
        if self._cipher is None:
            raise SealedError("its credentials are sealed, and no key of proxywhirl's was given")
        try:
            return self._cipher.decrypt(token).decode()
        except (InvalidToken, UnicodeDecodeError):
            # Raised from None: an error of decoding would carry the secret along.
            raise SealedError("no key that was given opens its credentials") from None


def load_keyring(environment: Mapping[str, str], key_files: Sequence[Path]) -> Keyring:
    """The keys of proxywhirl's own variables, and those of files with one key on a line.

    Raises KeyringError.
    """
    found = {name: environment.get(name, "").strip() for name in KEY_VARIABLES}
    for path in key_files:
        try:
            lines = path.read_text("utf-8").splitlines()
        except OSError as error:
            raise KeyringError(f"key file {path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise KeyringError(f"key file {path} is no text") from None
        keys = {f"line {number} of {path}": line.strip() for number, line in enumerate(lines, start=1)}
        if not any(keys.values()):
            raise KeyringError(f"key file {path} is empty")
        found |= keys
    given = {place: key for place, key in found.items() if key}
    return Keyring([key.encode() for key in given.values()], list(given))
