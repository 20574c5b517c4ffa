"""The file of the encryption key, kept for as long as a cache seals with it."""

from __future__ import annotations

import logging
from pathlib import Path

from proxystash_server.cache.entry.credentials import create_key_file
from proxystash_server.cache.errors import EncryptionKeyError

logger = logging.getLogger(__name__)


class KeyFile:
    """Where the key in use is on disk: what is sealed must not outlive it. Used by one thread at a time."""

    def __init__(self, path: Path, key: bytes) -> None:
        self._path = path
        self._key = key
        self._was_there = path.exists()
        self._complaint = ""

    def keep(self) -> None:
        """Write the key to the file if that is missing, empty or cut short. Raises EncryptionKeyError.

        A file with another key is its operator's, and is complained of.
        """
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            content = b""
        except OSError as error:
            raise EncryptionKeyError(f"{self._path} cannot be read: {error.strerror}") from None
        if self._key in content.split():
            self._complaint = ""
        elif self._key.startswith(content.strip()):
            if self._was_there:
                logger.warning(
                    "the key file was removed or cut short, and is written again",
                    extra={"path": str(self._path)},
                )
            self._path.unlink(missing_ok=True)
            create_key_file(self._path, self._key)
        else:
            self._complain("it holds another key than the one that is in use")
        self._was_there = True

    def look_after(self) -> None:
        """The same while the cache runs: what cannot be done is complained of, once for each reason."""
        try:
            self.keep()
        except (EncryptionKeyError, OSError) as error:
            self._complain(str(error))

    def _complain(self, reason: str) -> None:
        if reason != self._complaint:
            self._complaint = reason
            logger.critical(
                "the key file is not what it was: without its key, what is sealed cannot be opened after a "
                "restart",
                extra={"path": str(self._path), "reason": reason},
            )
