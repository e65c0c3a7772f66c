"""One writer for a run folder: a file lock that the operating system releases when its holder dies.

``.lock`` in the folder is locked from a run's first check to its end and says who holds it.  What
only reads a run (report, show, eval, export) needs no lock.  On file systems without locks a file
``.lock.owner`` stands for it, and whether its process still runs is looked up where that can be.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path

from patchmine.errors import Say, UserError, shown_name
from patchmine.system.disk import remedy

NAME, OWNER = ".lock", ".lock.owner"
STOPPING_SECONDS = (
    300.0  # how long a holder that was asked to stop is waited for: it finishes its step and saves
)

_HANDLES: set[int] = (
    set()
)  # open lock files of this process, which forked children (data workers) must not keep locked


@dataclass(frozen=True)
class Holder:
    """Who writes to a run folder, as its lock file says; ``since`` in seconds since 1970.

    Making one of other things raises ValueError.
    """

    pid: int
    host: str
    since: float
    stopping: bool = False

    def __post_init__(self) -> None:
        numbers = type(self.pid) is int and isinstance(self.since, int | float)
        if (
            not numbers
            or not isinstance(self.host, str)
            or not 0 < self.pid < 2**31
            or not 0 <= self.since < 2**32
        ):
            raise ValueError(f"{self.pid!r}, {self.host!r}, {self.since!r} name no process")

    def __str__(self) -> str:
        moment, now = datetime.fromtimestamp(self.since), datetime.now()
        day = "" if moment.date() == now.date() else f"{moment:%Y-%m-%d} "
        return f"process {self.pid} on host {shown_name(self.host)} since {day}{moment:%H:%M}"


class BusyError(Exception):
    """Another process holds the lock; ``holder`` is None where it has not said who it is."""

    def __init__(self, holder: Holder | None) -> None:
        super().__init__(str(holder))
        self.holder = holder


class HeldLock:
    """The lock of ``folder``, held by this process.  Making one raises BusyError, or OSError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._me = Holder(os.getpid(), socket.gethostname(), time.time())
        self._handle = _acquire(folder, self._me)

    def renew(self) -> None:
        """Take the lock again where its file was removed, with the whole folder perhaps.

        Raises:
            UserError: another process has taken it meanwhile.
        """
        if _stands_for(self._handle, self.folder / NAME):
            return
        try:
            handle = _acquire(self.folder, self._me)
        except BusyError as error:
            raise UserError(_refusal(self.folder, error.holder)) from error
        except OSError as error:
            raise UserError(_unwritable(self.folder, error)) from error
        _close(self._handle)
        self._handle = handle

    def stopping(self) -> None:
        """Say that this process ends soon, so that the next one waits for it."""
        self._me = replace(self._me, stopping=True)
        _write(self._handle, self._me)
        if (self.folder / OWNER).exists():
            with suppress(OSError):
                (self.folder / OWNER).write_text(json.dumps(asdict(self._me)), encoding="utf-8")

    def release(self) -> None:
        """Let others write.  The files go while they are still locked, so that nobody's new ones
        are removed.
        """
        if _stands_for(self._handle, self.folder / NAME):
            for name in (OWNER, NAME):
                with suppress(OSError):
                    (self.folder / name).unlink()
        _close(self._handle)


@contextmanager
def lock(folder: Path, say: Say = lambda text: None) -> Iterator[HeldLock]:
    """Hold the lock of a run folder, which is made where it is missing and removed where nothing
    was put into it.

    A holder that was asked to stop is waited for, up to `STOPPING_SECONDS`; ``say`` hears so.

    Raises:
        UserError: another process holds it, with who it is; or the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # deepest first
    try:
        held = _wait_for(folder, say)
    except BusyError as error:
        raise UserError(_refusal(folder, error.holder)) from error
    except OSError as error:
        raise UserError(_unwritable(folder, error)) from error
    try:
        yield held
    finally:
        held.release()
        with suppress(OSError):  # the first that holds something ends it
            for path in made:
                path.rmdir()


def _wait_for(folder: Path, say: Say) -> HeldLock:
    """The lock, at once or when a holder that is stopping has ended.  Raises BusyError, OSError."""
    end = time.monotonic() + STOPPING_SECONDS
    told = False
    while True:
        try:
            return HeldLock(folder)
        except BusyError as error:
            if error.holder is None or not error.holder.stopping or time.monotonic() > end:
                raise
            if not told:
                say(
                    f"{folder} is still being written by {error.holder}, which was asked to "
                    "stop: waiting for it."
                )
        told = True
        time.sleep(0.1)


def _refusal(folder: Path, holder: Holder | None) -> str:
    text = (
        f"{folder} is being written by {holder or 'another process'}; wait for it, stop it, or "
        "choose another out"
    )
    owner = folder / OWNER
    if owner.exists():
        text += (
            " (this file system has no locks, and from here it cannot be seen whether that process "
            f"still runs; if it does not, remove {owner})"
        )
    return text


def _unwritable(folder: Path, error: OSError) -> str:
    return f"{folder} cannot be written ({error.strerror or error}); {remedy(error)}"


def _acquire(folder: Path, me: Holder) -> int:
    """An open file that is locked and stands under its name.  Raises BusyError, OSError."""
    path = folder / NAME
    for _ in range(100):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue  # the holder before us has just removed the folder that it had made
        try:
            if _lock_file(handle, folder, me) and _stands_for(handle, path):
                _write(handle, me)
                _keep_from_children(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(
            handle
        )  # the holder before us removed this file when it ended: there may be a new one
    raise BusyError(None)


def _lock_file(handle: int, folder: Path, me: Holder) -> bool:
    """True when it is locked.  Raises BusyError."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise BusyError(_read_patiently(folder / NAME)) from None
        if error.errno not in (
            errno.ENOSYS,
            errno.ENOTSUP,
            errno.EOPNOTSUPP,
            errno.ENOLCK,
            errno.EINVAL,
        ):
            raise
        _claim(folder / OWNER, me)
    return True


def _claim(owner: Path, me: Holder) -> None:
    """Make the file that stands for a lock.  Raises BusyError unless its process is known to have
    ended.
    """
    other = _read(owner)
    if other is not None and (other.pid, other.host, other.since) == (me.pid, me.host, me.since):
        return
    if owner.exists() and (other is None or not _has_ended(other)):
        raise BusyError(other)
    if other is not None:
        # Of two that find it, one can rename it.
        left = owner.with_name(f"{OWNER}.{os.getpid()}")
        try:
            owner.rename(left)
        except FileNotFoundError:
            raise BusyError(_read_patiently(owner)) from None
        if _read(left) != other:
            left.rename(owner)  # it was quicker, and this is its own already
            raise BusyError(_read(owner))
        left.unlink()
    try:
        handle = os.open(owner, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        raise BusyError(_read_patiently(owner)) from None
    try:
        _write(handle, me)
    finally:
        os.close(handle)


def _has_ended(holder: Holder) -> bool:
    if holder.host != socket.gethostname():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _stands_for(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _write(handle: int, holder: Holder) -> None:
    with suppress(OSError):  # it only helps others to name us
        text = json.dumps(asdict(holder)).encode()
        os.ftruncate(handle, 0)
        os.pwrite(handle, text, 0)


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_bytes())) if path.is_file() else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _read_patiently(path: Path) -> Holder | None:
    """Who holds it; one that has just taken it writes its name within milliseconds."""
    for _ in range(20):
        if (found := _read(path)) is not None:
            return found
        time.sleep(0.01)
    return None


@cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_drop_in_child)


def _drop_in_child() -> None:
    while _HANDLES:
        with suppress(OSError):
            os.close(_HANDLES.pop())


def _keep_from_children(handle: int) -> None:
    _watch_forks()
    _HANDLES.add(handle)


def _close(handle: int) -> None:
    _HANDLES.discard(handle)
    os.close(handle)
