"""Sealing everything in a stopped store under a new key.

At no moment is there a credential that the keys at hand do not open. First the new key is written beside the
old ones, and both stores are made to demand all of them: a server started meanwhile with one key alone would
take the other's credentials for damage. Then the credentials are sealed anew, a store demands the new key
alone when nothing in it is left of the old seals, and at last the old keys are dropped. Each step may be
repeated, so a rotation that was killed is finished by running it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from proxystash_server.cache.check_report import Progress, Report, no_progress
from proxystash_server.cache.config import CacheConfig, CacheTierType
from proxystash_server.cache.credentials import (
    KEY_VARIABLE,
    CredentialEncryptor,
    UnreadableCredentialsError,
    keys_of_check,
    make_joint_check,
    read_key_file,
)
from proxystash_server.cache.errors import EncryptionKeyError, StoreError
from proxystash_server.cache.setup import L2_DATABASE, key_file, previous_keys
from proxystash_server.cache.tiers.files import replace_file
from proxystash_server.cache.tiers.resealing import Resealing, ResealingDatabase, ResealingJsonl
from proxystash_server.cache.tiers.stopped import StoppedStore
from proxystash_server.cache.tiers.stopped_jsonl import StoppedJsonl
from proxystash_server.cache.tiers.stopped_sqlite import StoppedDatabase


@dataclass(slots=True)
class Rotation:
    """What a rotation did: the credentials in each store, those of them it sealed, and what is left to do."""

    credentials: dict[str, int] = field(default_factory=dict)
    resealed: dict[str, int] = field(default_factory=dict)
    was_unfinished: bool = False
    advice: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Plan:
    """The key to seal under, the others at hand, and the key file if the keys are kept there."""

    target: bytes
    others: list[bytes]
    path: Path | None
    was_unfinished: bool
    advice: list[str]

    @property
    def keys(self) -> list[bytes]:
        return [self.target, *self.others]


def rotate_key(
    config: CacheConfig, new_key_file: Path | None = None, *, progress: Progress = no_progress
) -> Rotation:
    """Seal every credential of a stopped store under a new key.

    The new key is that of `new_key_file`; else, where the key is configured, the configured one, with the old
    one among the previous keys; else one that is generated and kept in the key file.

    Raises EncryptionKeyError and StoreError, having changed nothing, if a key is missing, wrong or malformed,
    or if there is damage in a store. TierError, OSError or sqlite3.Error leave a rotation to be finished.
    """
    plan = _plan(config, new_key_file)
    stores = _find_stores(config)
    rotation = Rotation(was_unfinished=plan.was_unfinished, advice=plan.advice)
    in_use = _survey([stopped for stopped, _ in stores], plan, rotation, progress)
    if plan.path is not None:
        _write_key_file(plan.path, plan.keys)
    everything = CredentialEncryptor(plan.target, plan.others)
    for _, store in stores:
        store.tidy_up(everything)
    if in_use - {plan.target}:
        joint = make_joint_check([plan.target, *(key for key in plan.others if key in in_use)])
        for _, store in stores:
            store.set_key_check(joint)
    reseal = _Reseal(plan)
    for _, store in stores:
        rotation.resealed[store.name] = store.reseal(reseal, progress)
        store.set_key_check(everything.make_check())
    if plan.path is not None:
        _write_key_file(plan.path, [plan.target])
    return rotation


class _Reseal:
    """The new seal of a token, or None for one that the target key has sealed."""

    def __init__(self, plan: _Plan) -> None:
        self._target = Fernet(plan.target)
        self._all = MultiFernet([Fernet(key) for key in plan.keys])

    def __call__(self, token: bytes) -> bytes | None:
        try:
            self._target.decrypt(token)
        except InvalidToken:
            return self._target.encrypt(self._all.decrypt(token))
        return None


class _Witness(CredentialEncryptor):
    """Opens credentials, and remembers the keys that it took."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        super().__init__(keys[0], keys[1:])
        self._each = [(key, CredentialEncryptor(key)) for key in keys]
        self.used: set[bytes] = set()

    def open(self, token: bytes | None) -> tuple[str | None, str | None]:
        if token is None:
            return None, None
        for key, encryptor in self._each:
            try:
                opened = encryptor.open(token)
            except UnreadableCredentialsError:
                continue
            self.used.add(key)
            return opened
        raise UnreadableCredentialsError("no key at hand opens the token")


def _plan(config: CacheConfig, new_key_file: Path | None) -> _Plan:
    secret = config.encryption_key
    configured = None if secret is None else secret.get_secret_value().encode()
    # For what it says of a malformed key; those of files are checked when they are read.
    CredentialEncryptor(configured, previous_keys(config))
    new_key = None if new_key_file is None else _read_new_key(new_key_file)
    path = key_file(config)
    filed = read_key_file(path) or []
    if configured is None:
        if not filed:
            raise EncryptionKeyError(
                f"there is no key to change: {path} is missing. Put the key file back, or give the key in "
                f"{KEY_VARIABLE}"
            )
        target = new_key or (filed[0] if len(filed) > 1 else Fernet.generate_key())
        plan = _Plan(target, [*filed, *previous_keys(config)], path, len(filed) > 1, [])
    else:
        plan = _plan_configured(config, configured, new_key_file, new_key, filed)
    others = [key for key in dict.fromkeys(plan.others) if key != plan.target]
    if not others:
        raise EncryptionKeyError("the new key is the one that is in use already; nothing was changed")
    return _Plan(plan.target, others, plan.path, plan.was_unfinished, plan.advice)


def _plan_configured(
    config: CacheConfig,
    configured: bytes,
    new_key_file: Path | None,
    new_key: bytes | None,
    filed: list[bytes],
) -> _Plan:
    others = [*previous_keys(config), *filed]
    previous = f"{KEY_VARIABLE}_PREVIOUS"
    if new_key is not None:
        advice = [
            f"from now on, {KEY_VARIABLE} must be the key in {new_key_file}, and {previous} is not needed"
        ]
        return _Plan(new_key, [configured, *others], None, False, advice)
    if not set(others) - {configured}:
        raise EncryptionKeyError(
            f"the key comes from {KEY_VARIABLE}, so the new one must too: set {KEY_VARIABLE} to the new key "
            f"and {previous} to the old one, and run this again; or name a file that holds the new key with "
            "--new-key-file"
        )
    advice = [f"{previous} is not needed any more"] if previous_keys(config) else []
    if filed:
        advice.append(f"{key_file(config)} is not used, since the key comes from {KEY_VARIABLE}: delete it")
    return _Plan(configured, others, None, False, advice)


def _read_new_key(path: Path) -> bytes:
    keys = read_key_file(path)
    if keys is None:
        raise EncryptionKeyError(f"{path} does not exist")
    if len(keys) > 1:
        raise EncryptionKeyError(f"{path} holds {len(keys)} keys; the new key must be the only one in it")
    return keys[0]


def _find_stores(config: CacheConfig) -> list[tuple[StoppedStore, Resealing]]:
    """Every store there is, also those that the configuration has switched off: they keep their seals."""
    database = config.l2_cache_dir / L2_DATABASE
    candidates: list[tuple[StoppedStore, Resealing]] = [
        (StoppedJsonl(CacheTierType.L2, config.l2_cache_dir), ResealingJsonl(config.l2_cache_dir)),
        (StoppedDatabase(CacheTierType.L2, database), ResealingDatabase("l2 (sqlite)", database)),
        (
            StoppedDatabase(CacheTierType.L3, config.l3_database_path),
            ResealingDatabase("l3 (sqlite)", config.l3_database_path),
        ),
    ]
    return [(stopped, resealing) for stopped, resealing in candidates if stopped.is_there()]


def _survey(
    stores: Sequence[StoppedStore], plan: _Plan, rotation: Rotation, progress: Progress
) -> set[bytes]:
    """The keys that are in use, having proven that every store is sound and every credential opens."""
    witness = _Witness(plan.keys)
    for store in stores:
        report = Report()
        try:
            readable = store.open(report)
            if readable and store.key_check is not None:
                makers = keys_of_check(store.key_check, plan.keys)
                if not makers:
                    raise EncryptionKeyError(
                        f"{store.path} was sealed under a key that is not at hand. Give that key in "
                        f"{KEY_VARIABLE}, or beside a newer one in {KEY_VARIABLE}_PREVIOUS"
                    )
                witness.used |= makers
            if readable:
                for _ in store.entries(witness, report, progress):
                    pass
        finally:
            store.close()
        if report.faults:
            fault = report.faults[0]
            raise StoreError(
                f"{fault.place}: {fault.message}. Repair the store first, with proxystash-server check "
                "--repair; nothing was changed"
            )
        rotation.credentials[f"{store.tier} ({store.totals.backend})"] = store.totals.credentials
        if store.totals.set_aside:
            rotation.advice.append(
                f"{store.totals.set_aside} damaged records that were set aside in {store.path} keep their "
                "old seals: delete them when you have looked at them"
            )
    return witness.used


def _write_key_file(path: Path, keys: Sequence[bytes]) -> None:
    replace_file(path, b"".join(key + b"\n" for key in keys), sync=True)
