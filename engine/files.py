"""Files that are never seen half written, and folders that one process at a time writes to."""

import contextlib
import os
from pathlib import Path

import filelock

from engine.settings import UserError


@contextlib.contextmanager
def atomic_write(path, previous=None):
    """Yield a temporary path beside `path`, and rename it to `path` at the end.

    The file that was there before is kept as `previous`, if that is given.
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows syncs only a file that is open for writing
            os.fsync(file.fileno())  # else a power cut could leave the new name on missing data
        if previous and Path(path).exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


class FolderInUse(UserError):
    """Another process is writing to the folder."""


@contextlib.contextmanager
def locked(folder, name="lock", waiting=""):
    """Keep other processes out of a folder, by its file `lock`. The lock ends with the process, however that ends.

    With a line `waiting`, print it and wait while another process holds the lock. Yields whether that was so.
    Raises FolderInUse if another process holds it, UserError if the folder cannot be written to. On a file system
    without locks, the caller goes on without one.
    """
    lock = filelock.FileLock(Path(folder) / name, fallback_to_soft=False)  # a soft lock outlives a killed process
    try:
        open(lock.lock_file, "a").close()  # filelock would report a folder that is read-only as locked
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        lock.acquire(blocking=False)
        waited = False
    except filelock.Timeout as error:
        if not waiting:
            raise FolderInUse(f"another run is writing to {folder}; --out_dir names another folder") from error
        print(waiting, flush=True)
        waited = bool(lock.acquire())
    except OSError:  # no locks here: the run is worth more than the protection
        waited = False
    try:
        yield waited
    finally:
        lock.release()
