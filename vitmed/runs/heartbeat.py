"""A lock for file systems that have none: a file that its holder touches for as long as it lives.

A holder that dies leaves the file, which then goes unchanged and is taken over after STALE_SECONDS. Ages are read off the file system's own
clock (the time of a file written just now) and a newcomer watches the file besides, so that the clocks of two machines need not agree. Of
two that take over at the same moment the file names one, and the other sees that a moment later. A holder that slept past STALE_SECONDS
and was replaced finds that out at its next beat and ends at once: what it had saved is there, and the other goes on from it.
"""

import contextlib
import datetime
import os
import pathlib
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from vitmed import config
from vitmed.runs import files

NAME = ".heartbeat"
SIGNATURE = re.compile(r"process \d+ on [\w.-]+ since [-+:. \d]+\d")
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
LOOK_SECONDS = 1.0
SETTLE_SECONDS = 2.0  # after a takeover, until all who tried it have written: more than a file system takes to show a rename


class Sign(NamedTuple):
    """What the file holds (who wrote it and a random word, so that no two holders are alike) and when it was last touched."""

    content: bytes
    touched_ns: int


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Hold the folder while the context lasts; MachineError that names the holder where it is held by one that lives.

    Waits up to STALE_SECONDS to tell whether a holder lives. The process ends, with status 1, where another takes the folder meanwhile.
    """
    file = folder / NAME
    mine = f"{signature()}\n{secrets.token_hex(8)}\n".encode()
    try:
        _wait_until_free(file)
        files.write_whole(file, mine)
        time.sleep(SETTLE_SECONDS)
        if (sign := _look(file)) is None or sign.content != mine:
            raise in_use(folder, sign.content if sign else b"")
    except OSError as error:
        raise config.MachineError(f"{folder} cannot be locked: {error.strerror or error}") from error
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(file, mine, done), name="heartbeat", daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join()
        with contextlib.suppress(OSError):  # it goes stale by itself
            if (sign := _look(file)) is not None and sign.content == mine:
                file.unlink()


def _wait_until_free(file: pathlib.Path) -> None:
    """Return where there is no holder, or one that gives no sign any more; MachineError where there is one that does."""
    first = sign = _look(file)
    if first is None:
        return
    started = time.monotonic()
    age = (_now_ns(file) - first.touched_ns) / 1e9
    if age < STALE_SECONDS:
        print(f"vitmed: {file.parent}: watching whether {signed_by(first.content)} lives, {STALE_SECONDS:.0f} s at most", file=sys.stderr)
    while age < STALE_SECONDS and time.monotonic() - started < STALE_SECONDS:
        time.sleep(LOOK_SECONDS)
        if (sign := _look(file)) is None:
            return
        if sign != first:
            raise in_use(file.parent, sign.content)
    print(f"vitmed: {file.parent}: {signed_by(first.content)} gives no sign of life; going on in its place", file=sys.stderr)


def _beat(file: pathlib.Path, mine: bytes, done: threading.Event) -> None:
    """Touch the file until done; end the process where it is another's."""
    while not done.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):  # a server out of reach for a while: the run's own writing will tell
            sign = _look(file)
            if sign is not None and sign.content != mine:
                print(
                    f"vitmed: {in_use(file.parent, sign.content)}: it took this run for dead; ending this one", file=sys.stderr, flush=True
                )
                os._exit(1)
            os.utime(file)


def _look(file: pathlib.Path) -> Sign | None:
    """What the file says now, None where it is not there; opened anew, since network file systems keep attributes for a while."""
    try:
        with open(file, "rb") as stream:
            return Sign(stream.read(4096), os.fstat(stream.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def _now_ns(file: pathlib.Path) -> int:
    """The time by the file system's clock."""
    probe = file.with_name(f"{NAME}.{secrets.token_hex(8)}")
    try:
        probe.write_bytes(b"now")
        return probe.stat().st_mtime_ns
    finally:
        probe.unlink(missing_ok=True)


def signature() -> str:
    """Who this process is, for the message of who comes next."""
    started = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {started}"


def signed_by(content: bytes) -> str:
    """The signature at the beginning of a lock's file: it may be half written, or by another hand."""
    signed = SIGNATURE.match(content.decode(errors="replace"))
    return signed.group() if signed else "another process"


def in_use(folder: pathlib.Path, content: bytes) -> config.MachineError:
    """The error that says whose a folder is, by the content of its lock's file."""
    return config.MachineError(f"{folder} is in use by {signed_by(content)}; wait for it to end or give another --workdir")
