"""Sealing everything in a stopped store under a new key.

First the stores make up for the changes they have missed, as at a start: the journal is not sealed anew.

At no moment is there a credential that the keys at hand do not open. First the new key is written beside the
old ones, and both stores are made to demand all of them: a server started meanwhile with one key alone would
take the other's credentials for damage. Then the credentials are sealed anew, a store demands the new key
alone when nothing in it is left of the old seals, and at last the old keys are dropped. Each step may be
repeated, so a rotation that was killed is finished by running it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.fernet import Fernet, MultiFernet
from pydantic import SecretStr

from proxystash_server.cache.config import CacheConfig, CacheTierType
from proxystash_server.cache.entry.credentials import (
    KEY_VARIABLE,
    CredentialEncryptor,
    UnreadableCredentialsError,
    keys_of_check,
    make_joint_check,
    read_key_file,
)
from proxystash_server.cache.errors import EncryptionKeyError, StoreError
from proxystash_server.cache.ground.files import replace_file
from proxystash_server.cache.manager import CacheManager
from proxystash_server.cache.setup import L2_DATABASE, key_file, missed_changes_path, previous_keys
from proxystash_server.cache.stopped.check import note_leftovers
from proxystash_server.cache.stopped.jsonl import StoppedJsonl
from proxystash_server.cache.stopped.report import Progress, Report, no_progress
from proxystash_server.cache.stopped.resealing import Resealing, ResealingDatabase, ResealingJsonl
from proxystash_server.cache.stopped.sqlite import StoppedDatabase
from proxystash_server.cache.store_lock import StoreLock

_PREVIOUS: Final = f"{KEY_VARIABLE}_PREVIOUS"
# What holds seals and is nobody's but the operator's.
_KEPT_AS_THEY_ARE: Final = frozenset({"set_aside", "damaged_file"})


@dataclass(slots=True)
class Rotation:
    """What a rotation did: the credentials in each store, those of them it sealed, and what is left to do."""

    credentials: dict[str, int] = field(default_factory=dict)
    resealed: dict[str, int] = field(default_factory=dict)
    was_unfinished: bool = False
    advice: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Plan:
    """The key to seal under, and the others at hand."""

    target: bytes
    others: list[bytes]
    # None where the keys are configured.
    key_file: Path | None
    was_unfinished: bool

    @property
    def keys(self) -> list[bytes]:
        return [self.target, *self.others]


def rotate_key(
    config: CacheConfig, new_key_file: Path | None = None, *, progress: Progress = no_progress
) -> Rotation:
    """Seal every credential of a stopped store, which is locked meanwhile, under a new key.

    The new key is that of `new_key_file`; else, where the key is configured, the configured one, with the old
    one among the previous keys; else one that is generated and kept in the key file.

    Raises EncryptionKeyError and StoreError, having changed no seal, if the store is in use, if a key is
    missing, wrong or malformed, if there is damage in a store, or if the stores cannot make up for what they
    have missed. TierError, OSError or sqlite3.Error leave a rotation to be finished.
    """
    with StoreLock(config, "changing the encryption key") as lock:
        return _rotate_key(config, lock, new_key_file, progress)


def _rotate_key(
    config: CacheConfig, lock: StoreLock, new_key_file: Path | None, progress: Progress
) -> Rotation:
    plan = _plan(config, new_key_file)
    _apply_missed_changes(config, lock, plan)
    stores = _find_stores(config)
    keyring = _Keyring(plan.keys)
    rotation = Rotation(was_unfinished=plan.was_unfinished, advice=_advice(config, new_key_file))
    _survey(config, stores, keyring, rotation, progress)
    if plan.key_file is not None:
        _write_key_file(plan.key_file, plan.keys)
    for store in stores:
        store.tidy_up(keyring)
    if keyring.in_use - {plan.target}:
        joint = make_joint_check([key for key in plan.keys if key in {plan.target, *keyring.in_use}])
        for store in stores:
            store.set_key_check(joint)
    for store in stores:
        rotation.resealed[store.name] = store.reseal(keyring.reseal, progress)
        store.set_key_check(keyring.make_check())
    if plan.key_file is not None:
        _write_key_file(plan.key_file, [plan.target])
    return rotation


def _apply_missed_changes(config: CacheConfig, lock: StoreLock, plan: _Plan) -> None:
    """Have the stores make up for what they have missed, as a start does."""
    path = missed_changes_path(config)
    if not path.exists():
        return
    # Where the key moves from the file to the configuration, a cache does not look into the file.
    previous = tuple(SecretStr(key.decode()) for key in plan.others)
    update = {"previous_encryption_keys": previous, "enable_background_cleanup": False}
    CacheManager(config.model_copy(update=update), background=False, lock=lock).close()
    if path.exists():
        raise StoreError(
            f"{path} has changes that the slowest tier has missed, and cannot take now. Let a server work "
            "them off first, or move the file away to go on without them; no key was changed"
        )


class _Keyring(CredentialEncryptor):
    """The new key and the others at hand; remembers which of them it took to open what there is."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        super().__init__(keys[0], keys[1:])
        self.keys = keys
        self._all = MultiFernet([Fernet(key) for key in keys])
        self._each = [(key, CredentialEncryptor(key)) for key in keys]
        self.in_use: set[bytes] = set()

    def open(self, token: bytes | None) -> tuple[str | None, str | None]:
        if token is None:
            return None, None
        for key, encryptor in self._each:
            with suppress(UnreadableCredentialsError):
                opened = encryptor.open(token)
                self.in_use.add(key)
                return opened
        raise UnreadableCredentialsError("no key at hand opens the token")

    def reseal(self, token: bytes) -> bytes | None:
        """The new seal of a token, or None if the new key has sealed it."""
        try:
            self._each[0][1].open(token)
        except UnreadableCredentialsError:
            return self._all.rotate(token)
        return None


def _plan(config: CacheConfig, new_key_file: Path | None) -> _Plan:
    secret, previous = config.encryption_key, previous_keys(config)
    configured = None if secret is None else secret.get_secret_value().encode()
    # For what it says of a malformed key; those of files are checked when they are read.
    CredentialEncryptor(configured, previous)
    path = key_file(config)
    filed = read_key_file(path) or []
    at_hand = [*filed, *previous] if configured is None else [configured, *filed, *previous]
    was_unfinished = configured is None and len(filed) > 1
    if not filed and configured is None:
        raise EncryptionKeyError(
            f"there is no key to change: {path} is missing. Put the key file back, or give the key in "
            f"{KEY_VARIABLE}"
        )
    if new_key_file is not None:
        target = _read_new_key(new_key_file)
    elif configured is not None or was_unfinished:
        target = at_hand[0]
    else:
        target = Fernet.generate_key()
    others = [key for key in dict.fromkeys(at_hand) if key != target]
    if not others and new_key_file is None:
        raise EncryptionKeyError(
            f"the key comes from {KEY_VARIABLE}, so the new one must too: set {KEY_VARIABLE} to the new key "
            f"and {_PREVIOUS} to the old one, and run this again; or name a file that holds the new key with "
            "--new-key-file"
        )
    if not others:
        raise EncryptionKeyError("the new key is the one that is in use already; nothing was changed")
    return _Plan(target, others, path if configured is None else None, was_unfinished)


def _advice(config: CacheConfig, new_key_file: Path | None) -> list[str]:
    if config.encryption_key is None:
        return []
    if new_key_file is not None:
        return [
            f"from now on, {KEY_VARIABLE} must be the key in {new_key_file}, and {_PREVIOUS} is not needed"
        ]
    advice = [f"{_PREVIOUS} is not needed any more"] if config.previous_encryption_keys else []
    if key_file(config).exists():
        advice.append(f"{key_file(config)} is not used, since the key comes from {KEY_VARIABLE}: delete it")
    return advice


def _read_new_key(path: Path) -> bytes:
    keys = read_key_file(path)
    if keys is None:
        raise EncryptionKeyError(f"{path} does not exist")
    if len(keys) > 1:
        raise EncryptionKeyError(f"{path} holds {len(keys)} keys; the new key must be the only one in it")
    return keys[0]


def _find_stores(config: CacheConfig) -> list[Resealing]:
    """Every store there is, also those that the configuration has switched off: they keep their seals."""
    candidates: list[Resealing] = [
        ResealingJsonl(StoppedJsonl(CacheTierType.L2, config.l2_cache_dir)),
        ResealingDatabase(StoppedDatabase(CacheTierType.L2, config.l2_cache_dir / L2_DATABASE)),
        ResealingDatabase(StoppedDatabase(CacheTierType.L3, config.l3_database_path)),
    ]
    return [store for store in candidates if store.stopped.is_there()]


def _survey(
    config: CacheConfig,
    stores: Sequence[Resealing],
    keyring: _Keyring,
    rotation: Rotation,
    progress: Progress,
) -> None:
    """Prove that every store is sound and that every credential opens."""
    report = Report()
    for store in stores:
        with closing(store.stopped) as stopped:
            is_open = stopped.open(report)
            if stopped.is_of_earlier_format:
                # Which the tier alone reads: opening it brings it to this one.
                store.tidy_up(keyring)
                is_open = stopped.open(report)
            if not is_open:
                continue
            if stopped.key_check is not None:
                makers = keys_of_check(stopped.key_check, keyring.keys)
                if not makers:
                    raise EncryptionKeyError(
                        f"{store.path} was sealed under a key that is not at hand. Give that key in "
                        f"{KEY_VARIABLE}, or beside a newer one in {_PREVIOUS}"
                    )
                keyring.in_use |= makers
            for _ in stopped.entries(keyring, report, progress):
                pass
        rotation.credentials[store.name] = stopped.totals.credentials
    if report.faults:
        fault = report.faults[0]
        raise StoreError(
            f"{fault.place}: {fault.message}. Repair the store first, with proxystash-server check "
            "--repair; nothing was changed"
        )
    note_leftovers(config, report)
    for note in report.notes:
        if note.kind in _KEPT_AS_THEY_ARE:
            rotation.advice.append(f"{note.place} may keep old seals: {note.message}; {note.remedy}")


def _write_key_file(path: Path, keys: Sequence[bytes]) -> None:
    replace_file(path, b"".join(key + b"\n" for key in keys), sync=True)
