"""Makes the archives in this folder, with the code of a commit whose databases have format 2.

    git worktree add ../format-2 191d1a4 && cd ../format-2 && scripts/bootstrap
    .venv/bin/python THIS_FILE FOLDER_FOR_THE_ARCHIVES

Each is a data directory as a kill or an orderly end left it.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

KEY = "aW4gdGVzdHMgb25seTogbm90IGEgc2VjcmV0IGtleSE="
START_US = 1_800_000_000_000_000


class Stopwatch:
    """Monotonic seconds that a step moves."""

    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def make(directory: Path, backend: str, case: str) -> Path:
    """A store in `directory`; where it is when it is to be packed."""
    from proxystash_server.cache import CacheConfig, CacheManager, CacheTierConfig
    from proxystash_server.cache.errors import TierError

    def config(**fields: Any) -> CacheConfig:
        return CacheConfig.model_validate(
            {
                "l1_config": CacheTierConfig(max_entries=2),
                "l2_backend": backend,
                "l2_cache_dir": directory / "l2",
                "l3_database_path": directory / "l3" / "proxystash.db",
                "encryption_key": KEY,
                **fields,
            }
        )

    def put(key: str, source: str) -> None:
        entry = manager.new_entry("http://u:secret@192.0.2.1:8080", key=key, source=source)
        assert manager.put(key, entry)

    def fail(*_arguments: object, **_options: object) -> Any:
        raise TierError("away")

    def open_cache(**fields: Any) -> Any:
        return CacheManager(config(**fields), clock=lambda: START_US, monotonic=Stopwatch(), background=False)

    manager = open_cache()
    for number in range(8):
        put(f"key-{number}", "before")
    put("replaced", "before")
    put("deleted", "before")
    manager.invalidate_by_health("key-3")
    if case in ("l3 away", "l2 away", "l3 away and cleared"):
        tier = manager.l3_tier if case.startswith("l3") else manager.l2_tier
        tier.apply = tier.clear = tier.touch = fail
        for number in range(4):
            put(f"meanwhile-{number}", "meanwhile")
        if case.endswith("cleared"):
            manager.clear()
    if case == "l3 off":
        manager.close()
        manager = open_cache(l3_config=CacheTierConfig(enabled=False))
    put("replaced", "after")
    manager.delete("deleted")
    if case not in {"stopped", "l3 off"}:
        killed = directory.with_name("killed")
        shutil.copytree(directory, killed)
        return killed
    manager.close()
    return directory


if __name__ == "__main__":
    for backend in ("jsonl", "sqlite"):
        for case in ("stopped", "killed", "l3 away", "l2 away", "l3 away and cleared", "l3 off"):
            with tempfile.TemporaryDirectory() as place:
                left = make(Path(place) / "data", backend, case)
                name = f"{backend}-{case.replace(' ', '-')}.tar.gz"
                with tarfile.open(Path(sys.argv[1]) / name, "w:gz") as archive:
                    for path in sorted(left.rglob("*")):
                        if not path.name.endswith("-shm"):
                            archive.add(path, path.relative_to(left), recursive=False)
