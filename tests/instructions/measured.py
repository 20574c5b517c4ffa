"""The process that runs under callgrind: `python -m tests.instructions.measured JOBS PATH...`.

It imports everything once, which is most of what there is to execute, and forks a process for each path.
That one calls `os.ctermid` before and after the counted part: callgrind, told so, writes a dump at each call
of the C function below it, which nothing else uses. A line of JSON on standard output says of each path which
process ran it, and how many operations were counted.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.instructions import paths
from tests.instructions.store import Store, fixed_timer

# Enough for the interpreter to specialize its code, and for the caches below it to fill.
_WARM_UP = 32


def main(jobs: int, names: Sequence[str]) -> int:
    """Run the paths, `jobs` at a time; the exit code, 1 if one failed."""
    gc.disable()
    running: dict[int, paths.Path] = {}
    failed = False
    for name in names:
        while len(running) >= jobs:
            failed |= not _wait_for_one(running)
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            _run_and_exit(paths.PATHS[name])
        running[pid] = paths.PATHS[name]
    while running:
        failed |= not _wait_for_one(running)
    return 1 if failed else 0


def _wait_for_one(running: dict[int, paths.Path]) -> bool:
    pid, status = os.wait()
    path = running.pop(pid)
    if status == 0:
        print(json.dumps({"path": path.name, "pid": pid, "operations": path.repeats}))
    return status == 0


def _run_and_exit(path: paths.Path) -> None:
    # Without the clean-up of the interpreter: it is not ours to count, and the parent's to do.
    code = 1
    try:
        _run(path)
        code = 0
    except BaseException:  # noqa: BLE001 -- a child must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _run(path: paths.Path) -> None:
    with TemporaryDirectory(prefix="proxystash-instructions-") as directory, fixed_timer():
        store = Store(Path(directory), path.bounded)
        warm_up = min(_WARM_UP, path.repeats)
        work = path.prepare(store, warm_up + path.repeats)
        work.run(stop=warm_up)
        os.ctermid()
        results = work.run(start=warm_up)
        os.ctermid()
        assert len(results) == path.repeats
        store.manager.close()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
