"""One trainer at a time in a results folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..checkpoint import CheckpointError
from ..watching.log import writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def _try_lock(file: IO) -> bool:
    """Lock an open file for as long as it is open, whatever ends the process."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            file.seek(1 << 20)  # the locked byte cannot be read, and the text must be
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # a file system without locks: nothing can be said
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block no other process can lock the folder.

    Raises:
        CheckpointError: another trainer holds the lock; says which.
    """
    path = folder / ".lock"
    while True:
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+")  # noqa: SIM115 -- closed below
        if not _try_lock(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise CheckpointError(
                f"{folder} is in use by {holder}: wait for it to end, stop it, or choose another "
                "results_folder"
            )
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        file.close()  # the holder removed this file as it ended: lock the new one
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
    finally:
        if fcntl is not None:  # elsewhere an open file cannot be removed
            path.unlink(missing_ok=True)
        file.close()
