"""Broken and hostile inputs for readers, and what must hold of a reader whatever it is given.

`mutated` damages valid bytes; `Watch` runs a reader under what no input may cause: another exception than InputError, code that runs, a
process, a connection, a file written, far more memory than the input has bytes, a hang.
"""

import contextlib
import io
import json
import os
import pathlib
import random
import signal
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

from vitmed import config

MOST_BYTES = 100 << 20  # beyond eight times the input: the growth that readers allow a file, and what Python itself needs
LONGEST_SECONDS = 60
FORBIDDEN = ("exec", "os.exec", "os.fork", "os.posix_spawn", "os.system", "pickle.find_class", "socket.connect", "subprocess.Popen")
INSTALLED = (sys.prefix, sys.base_prefix, str(pathlib.Path(config.__file__).parent))
STRANGE_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
STRANGE_VALUES = (
    *(None, True, -1, 0, 1e308, 10**400, float("nan"), float("inf"), "", "\x00", "../../etc/passwd", "<script>alert(1)</script>"),
    *(
        "{{7*7}}",
        "__import__('os').system('true')",
        "'; DROP TABLE",
        "\x1b[31m",
        "\ud800",
        "x" * 10_000,
        [],
        {},
        [[[[[]]]]],
        {"a": {"b": None}},
    ),
)


# --- damage -----------------------------------------------------------------------------------------------------------------------


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four kinds of damage, as they are, within the JSON they hold or within the members of a zip archive."""
    kinds = [_bytes_damaged]
    if data[:1] in (b"{", b"["):
        kinds += [_json_damaged] * 3
    if data[:2] == b"PK":
        kinds += [_zip_damaged] * 2
    if data[8:9] == b"{":
        kinds += [_header_damaged] * 2
    for _ in range(rng.randint(1, 4)):
        data = rng.choice(kinds)(data, rng)
    return data


def _bytes_damaged(data: bytes, rng: random.Random) -> bytes:
    content = bytearray(data)
    near_an_end = rng.random() < 0.5  # headers and directories
    at = rng.randrange(min(300, len(content) + 1)) if near_an_end else rng.randrange(len(content) + 1)
    at = len(content) - at if near_an_end and rng.random() < 0.5 else at
    length = rng.choice((1, 2, 8, 100))
    match rng.randrange(7):
        case 0:
            content[at : at + 1] = bytes([rng.randrange(256)])
        case 1 if at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        case 2:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice(STRANGE_NUMBERS) & (1 << 8 * size) - 1
            content[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
        case 3:
            del content[at : at + length]
        case 4:
            content[at:at] = rng.choice((rng.randbytes(length), b"[" * 100_000, b'{"a":' * 100_000))
        case 5:
            content[at:at] = content[at : at + length] * rng.choice((1, 2, 50))
        case _:
            del content[at:]
    return bytes(content)


def _json_damaged(data: bytes, rng: random.Random) -> bytes:
    """A value, key or item replaced, removed or moved; JSON still, if it was, also in a line of several."""
    lines = data.splitlines() if data.count(b"\n{") else [data]
    chosen = rng.randrange(len(lines))
    try:
        tree = json.loads(lines[chosen])
        lines[chosen] = json.dumps(_tree_damaged(tree, rng)).encode()
    except (ValueError, RecursionError):
        return _bytes_damaged(data, rng)
    return b"\n".join(lines)


def _tree_damaged(tree: Any, rng: random.Random) -> Any:
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.05:
        deep = [[]]
        for _ in range(rng.choice((1, 900))):
            deep = [deep]
        return rng.choice((*STRANGE_VALUES, deep))
    if isinstance(tree, list):
        index = rng.randrange(len(tree))
        return rng.choice(
            (
                [*tree[:index], _tree_damaged(tree[index], rng), *tree[index + 1 :]],
                tree[:index] + tree[index + 1 :],
                tree * rng.choice((2, 100)),
            )
        )
    key = rng.choice(list(tree))
    rest = {name: value for name, value in tree.items() if name != key}
    return rng.choice(({**tree, key: _tree_damaged(tree[key], rng)}, rest, {**rest, rng.choice(("", "\n", "x", "<b>")): tree[key]}))


def _zip_damaged(data: bytes, rng: random.Random) -> bytes:
    """Members damaged before they are packed, so that checksums are right; renamed, left out, twice there or otherwise packed."""
    packed = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            members = [(name, old.read(name)) for name in old.namelist()]
    except Exception:  # noqa: BLE001  damaged before
        return _bytes_damaged(data, rng)
    chosen = rng.randrange(len(members)) if members else 0
    with zipfile.ZipFile(packed, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))) as new, _quiet():
        for index, (name, content) in enumerate(members):
            kind = rng.randrange(8) if index == chosen else -1
            if kind == 0:
                continue
            if kind == 1:
                name = rng.choice(("../../x.npy", "/etc/x", name + "\x00", name.upper(), name.removesuffix(".npy"), name[:200] * 200))
            if kind > 2:
                content = _bytes_damaged(content, rng)
            for _ in range(2 if kind == 2 else 1):
                new.writestr(name, content)
    return packed.getvalue()


def _header_damaged(data: bytes, rng: random.Random) -> bytes:
    """The JSON header of a safetensors file damaged, its length put right again."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = _json_damaged(data[8:end], rng)
    return len(header).to_bytes(8, "little") + header + data[end:]


# --- what must hold ---------------------------------------------------------------------------------------------------------------


class Watch:
    """Runs readers and counts how their inputs were taken; an AssertionError says what no input may do."""

    def __init__(self):
        self.accepted = self.refused = 0
        self._allowed: str | None = None
        self._seen: list[str] = []
        sys.addaudithook(self._audit)  # for good: Python takes none away

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._allowed is None:
            return
        if event == "exec" and arguments[0].co_filename.startswith(INSTALLED):
            return  # a module that is imported late
        if event in FORBIDDEN:
            self._seen.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._seen.append(f"open for writing {arguments!r:.200}")

    def read(self, reader: Callable[[], Any], num_bytes: int) -> None:
        """Call the reader on an input of so many bytes: it returns, or raises InputError of one short, printable line."""
        self._seen.clear()
        tracemalloc.start()
        try:
            with _time_limit(), _quiet():
                self._allowed = "reading"
                try:
                    reader()
                    self.accepted += 1
                except config.InputError as error:
                    self.refused += 1
                    line = " ".join(str(error).split())
                    assert 0 < len(line) < 5000, "a refusal of no or too many words"
                finally:
                    self._allowed = None
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert not self._seen, self._seen
        assert most < 8 * num_bytes + MOST_BYTES, f"{most} bytes of memory for an input of {num_bytes}"


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"not done after {LONGEST_SECONDS} s")

    former = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(action="ignore"):
        yield
