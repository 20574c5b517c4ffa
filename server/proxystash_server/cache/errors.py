"""The errors of the cache: one small hierarchy, none of which ever carries a credential."""

from __future__ import annotations

import errno

_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


class CacheError(Exception):
    """Base of everything the cache raises on purpose."""


class InvalidEntryError(CacheError, ValueError):
    """A key or an entry that breaks a limit; nothing was changed.

    `field` is the contract's name of the field at fault, `reason` a machine-readable word such as
    `INVALID_PROXY_URL`.
    """

    def __init__(self, field: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        # For pickle and copy, which would make it of the message alone.
        return type(self), (self.field, self.reason, str(self)), vars(self)


class NotStoredError(CacheError):
    """There is no entry of that key, which was to be changed; nothing was."""


class BannedError(CacheError):
    """The proxy is banned after its failures, and puts of it are refused; nothing was changed."""


class CacheUnavailableError(CacheError):
    """No tier is able to serve the request now; it may be tried again."""


class CacheClosedError(CacheUnavailableError):
    """The manager has been closed, or was made in the process that this one was forked from."""


class StoreError(CacheError):
    """A store on disk that must not be opened; the message says what to do. Nothing was changed."""


class StoreInUseError(StoreError):
    """Another cache has the store open; the message says which, if it is known."""


class EncryptionKeyError(StoreError):
    """The encryption key is malformed, missing, or not the one the store was sealed under."""


class StoreFormatError(StoreError):
    """The store was written by a newer version, or is no store of ours."""


class TierError(CacheError):
    """One operation of one tier failed for a reason of the tier's own (disk, lock, connection).

    Raised by tiers, handled by the manager, which goes on with the other tiers; callers of the manager never
    see it.
    """


class TierLostError(TierError):
    """What the tier keeps its entries in is damaged or gone: it is skipped at once."""


class NoDescriptorsError(TierError):
    """The process or the machine has no file descriptor left, for which the tier cannot be blamed."""


def tier_error(error: OSError) -> TierError:
    """What a fault of the file system is to a tier."""
    kind = NoDescriptorsError if error.errno in _NO_DESCRIPTORS else TierError
    return kind(f"{type(error).__name__}: {error.strerror}")
