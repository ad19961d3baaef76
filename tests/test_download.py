"""The downloader against a local server with faults: resume, retry, MD5, locking; nothing but whole files ever appears in place."""

import contextlib
import functools
import hashlib
import http.client
import http.server
import os
import re
import resource
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from vitmed import config
from vitmed.data import download, medmnist, sources

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
URL = "https://zenodo.invalid/records/1/files/x.npz?download=1"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answer each request as the next of the server's `faults` says, and well when there are none left."""

    protocol_version = "HTTP/1.1"

    def handle(self):
        with contextlib.suppress(ConnectionError):  # whoever asked may have gone
            super().handle()

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append(asked)
        fault = server.faults.pop(0) if server.faults else server.always
        content, start = server.content, 0
        if isinstance(fault, int):
            return self.answer(fault, b"")
        if asked and fault not in ("no range", "cut, no range"):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(content):
                return self.answer(416, b"", ("Content-Range", f"bytes */{len(content)}"))
        if fault == "wrong":
            return self.answer(200, b"<html>log in first</html>")
        if fault == "slow":
            time.sleep(0.8)
        if fault == "redirect to http":
            return self.answer(302, b"", ("Location", "http://127.0.0.1/x.npz"))
        shift = 7 if fault == "other range" else 0
        status = 206 if asked and "no range" not in str(fault) else 200
        headers = [("Content-Range", f"bytes {start + shift}-{len(content) - 1}/{len(content)}")] if status == 206 else []
        body = content[start + shift :]
        if fault == "no length":
            headers.append(("Connection", "close"))
            return self.answer(status, body, *headers, length=None)
        self.answer(status, body, *headers, cut=len(body) // 2 if "cut" in str(fault) else None)

    def answer(self, status, body, *headers, cut=None, length=0):
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        if length is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])
        self.close_connection = True

    def log_message(self, *args):
        """Say nothing."""


class Opener:
    """Stands for the https opener: the same redirection rule, but every https address is the local server."""

    def __init__(self, port):
        self.port = port
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), download._HttpsRedirects)

    def open(self, request, timeout):
        assert timeout <= 60
        url = re.sub(r"^https://[^/]+", f"http://127.0.0.1:{self.port}", request.full_url)
        return self.opener.open(urllib.request.Request(url, headers=dict(request.header_items())), timeout=timeout)


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.faults, server.always, server.content = [], [], None, CONTENT
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def fetch(server, tmp_path):
    """Download CONTENT to tmp_path/x.npz without waiting between tries."""
    return functools.partial(
        download.fetch, URL, tmp_path / "x.npz", md5=MD5, opener=Opener(server.server_address[1]), waits=(0.0, 0.0, 0.0)
    )


def _is_whole(folder):
    return [path.name for path in folder.iterdir()] == ["x.npz"] and (folder / "x.npz").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        ([], [0]),
        ([503, 500, 429], [0, 0, 0, 0]),
        (["cut"], [0, 150_000]),
        (["cut"] * 6, [0, 150_000, 225_000, 262_500, 281_250, 290_625, 295_312]),  # more than the tries: each brings something
        ([503, 503, "cut", 503, 503, None], [0, 0, 0, 150_000, 150_000, 150_000]),
        (["cut", "no range"], [0, 150_000]),
        (["cut", "cut, no range"], [0, 150_000, 150_000]),
        (["cut", "other range"], [0, 150_000, 0]),
        (["no length"], [0]),
        (["wrong"], [0, 0]),
        (["cut", "wrong"], [0, 150_000, 0]),
    ],
    ids=str,
)
def test_faults_that_are_overcome(faults, requests, server, fetch, tmp_path):
    server.faults = list(faults)
    fetch()
    assert _is_whole(tmp_path)
    assert server.requests == [f"bytes={start}-" if start else None for start in requests]


@pytest.mark.parametrize(
    ("part", "requests"),
    [
        (CONTENT[:1000], ["bytes=1000-"]),
        (CONTENT, ["bytes=300000-"]),  # whole, but stopped before it was moved into place: 416
        (CONTENT + b"more", ["bytes=300004-", None]),
        (b"rubbish", ["bytes=7-", None]),  # a part of something else is found out by the MD5
    ],
    ids=["begun", "whole", "too long", "rubbish"],
)
def test_a_part_file_is_continued(part, requests, server, fetch, tmp_path):
    (tmp_path / "x.npz.part").write_bytes(part)
    fetch()
    assert _is_whole(tmp_path)
    assert server.requests == requests


def test_an_existing_file_is_left_alone(server, fetch, tmp_path):
    (tmp_path / "x.npz").write_bytes(b"mine")
    fetch()
    assert (tmp_path / "x.npz").read_bytes() == b"mine"
    assert not server.requests


def test_folders_are_made(server, fetch, tmp_path):
    path = tmp_path / "a" / "b" / "x.npz"
    download.fetch(URL, path, md5=MD5, opener=fetch.keywords["opener"])
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("always", "says", "num_requests"),
    [
        ("wrong", "what comes has MD5", 2),
        (503, "503", 4),
        (404, "404", 1),
        ("redirect to http", "not https", 1),
        ("cut, no range", "the connection ended after 150000 of 300000 bytes", 4),  # each starts over, so only the first brings anything
    ],
)
def test_faults_that_stay(always, says, num_requests, server, fetch, tmp_path):
    server.always = always
    with pytest.raises(config.MachineError) as caught:
        fetch()
    message = str(caught.value)
    for part in (says, URL, "by hand", "named x.npz", str(tmp_path)):
        assert part in message
    assert "\n" not in message
    assert len(server.requests) == num_requests
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left in ({}, {"x.npz.part": CONTENT[:150_000]}), "what did come is kept, to be continued, and nothing else"


def test_an_unreachable_server(tmp_path):
    opener = Opener(9)  # the discard port, which nothing listens on
    with pytest.raises(config.MachineError, match="by hand"):
        download.fetch(URL, tmp_path / "x.npz", md5=MD5, opener=opener, waits=(0.0,))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["http://zenodo.org/x.npz", "file:///etc/passwd", "ftp://zenodo.org/x.npz", "", "HTTPS"])
def test_only_https(url, tmp_path):
    with pytest.raises(config.InputError, match="only https"):
        download.fetch(url, tmp_path / "x.npz", md5=MD5, opener=None)
    assert not list(tmp_path.iterdir())


def test_every_official_address_is_https_and_the_file_that_is_looked_for():
    for name, entry in medmnist.entries().items():
        for size, (url, md5) in entry.files.items():
            filename = f"{name}.npz" if size == 28 else f"{name}_{size}.npz"
            assert re.fullmatch(rf"https://zenodo\.org/records/\d+/files/{filename}\?download=1", url)
            assert re.fullmatch("[0-9a-f]{32}", md5)


def test_a_silent_server_times_out(server, fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server.faults = ["slow", "slow"]
    fetch()
    assert _is_whole(tmp_path)
    server.faults, server.always = [], "slow"
    with pytest.raises(config.MachineError, match="timed out"):
        download.fetch(URL, tmp_path / "y.npz", md5=MD5, opener=fetch.keywords["opener"], waits=(0.0,))


def test_waits_grow_between_tries(server, fetch, monkeypatch):
    slept = []
    monkeypatch.setattr(download.time, "sleep", slept.append)
    server.faults = [503, 503, 503]
    fetch(waits=download.WAITS)
    assert slept == sorted(slept) == list(download.WAITS)


def test_a_write_that_fails_is_not_tried_again(server, fetch, tmp_path):
    """A limit on the size of files stands for a full disk; writes up to it are short, not failures."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(config.MachineError, match=r"cannot write .*x\.npz\.part .*File too large.*make room"):
            fetch()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(server.requests) == 1
    assert (tmp_path / "x.npz.part").read_bytes() == CONTENT[:100_000]
    fetch()
    assert _is_whole(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(fetch, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(config.MachineError, match="Permission denied"):
        fetch()


def test_several_at_once_download_once(server, fetch, tmp_path):
    server.faults = ["slow"]
    threads = [threading.Thread(target=fetch) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _is_whole(tmp_path)
    assert server.requests == [None]


def test_when_one_gives_up_the_next_tries(server, fetch, tmp_path):
    server.faults = ["slow", "wrong"]
    server.content = CONTENT[:-1]
    failures = []

    def attempt():
        try:
            fetch()
        except config.MachineError as error:
            failures.append(error)

    first, second = threading.Thread(target=attempt), threading.Thread(target=attempt)
    first.start()
    while not server.requests:
        time.sleep(0.01)
    second.start()
    first.join()
    server.content = CONTENT
    second.join()
    assert len(failures) <= 1
    assert len(server.requests) in (3, 4)
    assert not (tmp_path / "x.npz.part").exists()


def test_a_lock_whose_holder_does_nothing_is_not_waited_for_forever(fetch, tmp_path, monkeypatch, server):
    monkeypatch.setattr(download, "STALL", 0.1)
    with open(tmp_path / "x.npz.part", "wb") as file:
        download.fcntl.flock(file, download.fcntl.LOCK_EX)
        with pytest.raises(config.MachineError, match="locked"):
            fetch()
    fetch()
    assert _is_whole(tmp_path)


def test_what_is_printed(server, fetch, capsys, monkeypatch, tmp_path):
    fetch()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"downloading {URL} to {tmp_path / 'x.npz'}\n", "without a terminal, one line and no bar"
    monkeypatch.setattr(download.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    download.fetch(URL, tmp_path / "y.npz", md5=MD5, opener=fetch.keywords["opener"])
    out, err = capsys.readouterr()
    assert out == ""
    assert "y.npz.part" in err
    assert "100%" in err


def test_load_downloads_what_no_folder_holds(server, shared_data, tmp_path, monkeypatch):
    """From a name to arrays, by the real file; the second time without the server."""
    server.content = (shared_data / "breastmnist.npz").read_bytes()
    monkeypatch.delenv("VITMED_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    opener = Opener(server.server_address[1])
    monkeypatch.setattr(download, "fetch", functools.partial(download.fetch, opener=opener, waits=()))
    for _ in range(2):
        loaded = sources.load("breastmnist", size=28)
        assert loaded.splits["train"].images.shape == (546, 28, 28, 1)
    assert server.requests == [None]
    assert [path.name for path in (tmp_path / ".medmnist").iterdir()] == ["breastmnist.npz"]


def test_the_default_opener_follows_no_redirection_away_from_https():
    handler = next(handler for handler in download.OPENER.handlers if isinstance(handler, urllib.request.HTTPRedirectHandler))
    request = urllib.request.Request(URL, headers={"Range": "bytes=5-"})
    answer = (None, 302, "Found", http.client.HTTPMessage())
    followed = handler.redirect_request(request, *answer, "https://elsewhere.invalid/x.npz")
    assert followed.full_url == "https://elsewhere.invalid/x.npz"
    assert followed.get_header("Range") == "bytes=5-"
    with pytest.raises(urllib.error.HTTPError, match="not https") as caught:
        handler.redirect_request(request, *answer, "http://elsewhere.invalid/x.npz")
    caught.value.close()
