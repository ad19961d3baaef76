"""One process per run folder, and signals that end a run tidily instead of in the middle of a step.

The lock is the kernel's (flock): it goes with the process that holds it, however that process dies, and knows no stale pids. Where the file
system has none, a heartbeat stands in for it.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Self

from vitmed import config
from vitmed.runs import heartbeat, processes

LOCK_NAME = ".lock"
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # EACCES: NFS, which makes flock a POSIX lock
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
ASKING_SECONDS = 0.1
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextlib.contextmanager
def lock(path: str | os.PathLike) -> Iterator[None]:
    """Hold the existing run folder `path` for this process; MachineError that names the holder if another process has it."""
    folder = pathlib.Path(path)
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise config.MachineError(f"{path} cannot be locked: {error.strerror or error}") from error
    try:
        if not _try_lock(descriptor, folder=folder):
            with heartbeat.held(folder):
                yield
            return
        _sign(descriptor)
        try:
            yield
        finally:  # said aloud, since closing alone keeps the lock for forked children
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)  # the file stays: removing it would let two processes lock two files of one name


def holder(path: str | os.PathLike) -> str | None:
    """Who holds a run folder, by the words in its lock; None where nobody does or there is no folder. Waits for nothing, writes nothing."""
    folder = pathlib.Path(path)
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that several may ask
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return None
    except OSError as error:
        if error.errno in HELD:
            return heartbeat.signed_by(os.pread(descriptor, 4096, 0))
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
    with contextlib.suppress(FileNotFoundError):  # by this machine's clock, which is good enough to tell people: who locks looks closer
        beat = folder / heartbeat.NAME
        if time.time() - beat.stat().st_mtime < heartbeat.STALE_SECONDS:
            return heartbeat.signed_by(beat.read_bytes())
    return None


def _try_lock(descriptor: int, *, folder: pathlib.Path) -> bool:
    """Take the lock; False where the file system has none, MachineError where another process holds it."""
    try:
        _lock_now(descriptor)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        if error.errno not in HELD:
            raise config.MachineError(f"{folder} cannot be locked: {error.strerror or error}") from error
        try:
            signed = os.pread(descriptor, 4096, 0)
        except OSError:
            signed = b""
        raise heartbeat.in_use(folder, signed) from error
    return True


def _lock_now(descriptor: int) -> None:
    """Take the lock, or raise after ASKING_SECONDS: who only asks, in `holder`, has it for less."""
    deadline = time.monotonic() + ASKING_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in HELD or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _sign(descriptor: int) -> None:
    """Write who holds the lock."""
    with contextlib.suppress(OSError):  # a full disk does not break the lock, only the message
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, heartbeat.signature().encode() + b"\n", 0)


def end_with_parent() -> None:
    """Have Linux send SIGTERM to this process when the one that started it dies, even by SIGKILL; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Signals:
    """Within the context, SIGTERM and SIGINT only set `requested` (the first signal's number); a second SIGINT interrupts at once.

    Handlers belong to the main thread: in any other the context does nothing. Former handlers return at the end.
    """

    def __init__(self):
        self.requested: int | None = None
        self._interrupted = False
        self._former: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._former[signum] = signal.signal(signum, self._handle)
        return self

    def check(self) -> None:
        """Raise config.Stopped if a signal came, to this process or to another one of its run: they stop at the same place."""
        if signum := processes.most(self.requested or 0):
            raise config.Stopped(signum)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self._former.items():
            # None is a handler that was not installed from Python, which Python cannot put back.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._former.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = int(signum)
        if signum != signal.SIGINT:
            return
        if self._interrupted:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self._interrupted = True
