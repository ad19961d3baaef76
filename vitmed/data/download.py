"""Fetch a file over https, whole or not at all: resumed, retried, its MD5 checked, moved into place when all is there."""

import fcntl
import http.client
import os
import pathlib
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import BinaryIO

import rich.console
import rich.progress

from vitmed import config
from vitmed.data import dataset

TIMEOUT = 60.0  # seconds without a byte after which a connection counts as broken
WAITS = (1.0, 4.0, 16.0)  # seconds before each further try; counted anew whenever the file has grown
STALL = 600.0  # seconds without progress after which another process's download is no longer waited for
BLOCK = 1 << 20  # bytes


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    """Follow a redirection only to https."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """The request for the new address; HTTPError where that is not https."""
        if not newurl.startswith("https://"):
            raise urllib.error.HTTPError(req.full_url, code, f"redirected to {newurl}, which is not https", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


OPENER = urllib.request.build_opener(_HttpsRedirects)


def fetch(
    url: str, path: pathlib.Path, *, md5: str, opener: urllib.request.OpenerDirector = OPENER, waits: Sequence[float] = WAITS
) -> None:
    """Download `url` (https) to `path` unless that exists: resumed, retried, moved into place once its MD5 is right; MachineError.

    Processes that want the same file take turns by a lock on `path`.part; the later ones find `path` there and are done.
    """
    if not url.startswith("https://"):
        raise config.InputError(f"{url}: only https addresses are downloaded; use the https one, or put {path.name} into {path.parent}")
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not os.path.exists(path):
            with open(part, "a+b", buffering=0) as file:
                _lock(file)
                if os.path.exists(part) and os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                    _complete(url, file, path=path, md5=md5, opener=opener, waits=waits)
                # else whoever had the lock has moved the file into place, or has given up and removed it
    except (OSError, http.client.HTTPException) as error:
        mend = f"fetch it by hand and put it, named {path.name}, into {path.parent}"
        raise config.MachineError(f"cannot download {url} ({error}); {mend}") from error


def _lock(file: BinaryIO) -> None:
    """Wait for the lock on a part file; TimeoutError where its holder makes no progress."""
    size, since = -1, time.monotonic()
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            now = os.fstat(file.fileno()).st_size
        if size < 0:
            print(f"waiting for another process, which downloads {file.name}", file=sys.stderr)
        if now != size:
            size, since = now, time.monotonic()
        elif time.monotonic() - since > STALL:
            raise TimeoutError(f"another process has locked {file.name} but downloads nothing")
        time.sleep(0.2)


def _complete(
    url: str, file: BinaryIO, *, path: pathlib.Path, md5: str, opener: urllib.request.OpenerDirector, waits: Sequence[float]
) -> None:
    """Fill the locked part file and move it to `path`; OSError where that fails, with nothing useless left behind."""
    if os.path.exists(path):  # moved into place between our look and our lock, so this part file is a new, empty one
        return os.unlink(file.name)
    if not sys.stderr.isatty():
        print(f"downloading {url} to {path}", file=sys.stderr)
    try:
        for _ in range(2):  # the second time from the start: the first may have continued a damaged part
            _receive(url, file, opener=opener, waits=waits)
            found = dataset.md5_of(file)
            if found == md5:
                os.fsync(file.fileno())
                return os.replace(file.name, path)
            file.truncate(0)
        raise OSError(f"what comes has MD5 {found}, the official file {md5}")
    finally:
        if os.fstat(file.fileno()).st_size == 0:
            os.unlink(file.name)


def _receive(url: str, file: BinaryIO, *, opener: urllib.request.OpenerDirector, waits: Sequence[float]) -> None:
    """Request what the part file lacks until it has all, trying again after each wait; OSError, HTTPException."""
    best, tries = file.seek(0, os.SEEK_END), 0
    while True:
        try:
            return _append(url, file, opener=opener)
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", 503)
            size = file.seek(0, os.SEEK_END)
            if size > best:  # measured against the best so far: a server that always starts over must not keep us forever
                best, tries = size, 0
            if tries == len(waits) or (code < 500 and code not in (408, 429)):
                raise
        time.sleep(waits[tries])
        tries += 1


def _append(url: str, file: BinaryIO, *, opener: urllib.request.OpenerDirector) -> None:
    """One request for what a part file lacks; OSError, HTTPException where the answer fails or ends early."""
    size = file.seek(0, os.SEEK_END)
    headers = {"User-Agent": "vitmed"} | ({"Range": f"bytes={size}-"} if size else {})
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # there is nothing after `size`: the part is whole, or no part of this file; the MD5 will tell
                return
            raise
    with response:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {size}-"):
            file.truncate(0)
            if response.status == 206:
                raise ConnectionError("the server sent another range than asked for")
            size = 0  # the server ignores ranges: this is the whole file
        total = None if response.length is None else size + response.length
        columns = (*rich.progress.Progress.get_default_columns(), rich.progress.DownloadColumn())
        with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            bar = progress.add_task(os.path.basename(file.name), total=total, completed=size)
            while block := response.read1(BLOCK):  # read1 keeps what has come when the connection breaks
                _write(file, block)
                size += len(block)
                progress.update(bar, completed=size)
    if total is not None and size < total:
        raise ConnectionError(f"the connection ended after {size} of {total} bytes")


def _write(file: BinaryIO, block: bytes) -> None:
    """Append a block to an unbuffered file; MachineError, which unlike a broken connection is not tried again."""
    view = memoryview(block)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        raise config.MachineError(f"cannot write {file.name} ({error}); make room, or name another folder with data.root") from error
