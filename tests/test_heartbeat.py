"""The lock of file systems without locks, with real processes and its seconds shortened."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from vitmed import config
from vitmed.runs import guard, heartbeat

BEAT, STALE = 0.2, 2.0
SECONDS = {"BEAT_SECONDS": BEAT, "STALE_SECONDS": STALE, "LOOK_SECONDS": 0.05, "SETTLE_SECONDS": 0.3}
HOLD = f"""
import errno, fcntl, sys
from vitmed import config
from vitmed.runs import guard, heartbeat
def unsupported(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = unsupported
vars(heartbeat).update({SECONDS})
try:
    with guard.lock(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.readline()
except config.MachineError as error:
    print(error, flush=True)
"""


def refuse_locks(monkeypatch, code):
    def unsupported(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", unsupported)


@pytest.fixture(autouse=True)
def without_locks(monkeypatch):
    refuse_locks(monkeypatch, errno.ENOLCK)
    for name, seconds in SECONDS.items():
        monkeypatch.setattr(heartbeat, name, seconds)


@contextlib.contextmanager
def process(path):
    """Another process that wants the folder; ended at the end."""
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], text=True, **pipes) as child:
        try:
            yield child
        finally:
            child.kill()


def test_a_second_process_is_refused_with_a_word_about_the_first(tmp_path, capsys):
    with process(tmp_path) as holder:
        assert holder.stdout.readline() == "held\n"
        who = f"process {holder.pid} on {socket.gethostname()} since 20"
        with pytest.raises(config.MachineError, match=f"is in use by {who}.*wait for it to end") as raised, guard.lock(tmp_path):
            pass
        assert f"watching whether {who}" in capsys.readouterr().err
        time.sleep(STALE)  # it beats: it is never too old
        with process(tmp_path) as second:
            assert second.stdout.readline().strip() == str(raised.value)
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.wait(timeout=20) == 0
    with guard.lock(tmp_path):  # at once
        assert not capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [guard.LOCK_NAME]


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_whatever_a_file_system_without_locks_says(tmp_path, monkeypatch, code):
    refuse_locks(monkeypatch, code)
    with guard.lock(tmp_path):
        assert (tmp_path / heartbeat.NAME).read_bytes().startswith(b"process ")


def test_a_killed_holder_is_taken_over_when_it_gives_no_sign(tmp_path, capsys):
    with process(tmp_path) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=20)
        killed = time.monotonic()
        with guard.lock(tmp_path):
            assert time.monotonic() - killed > STALE - BEAT - 0.1
            assert f"process {holder.pid} on {socket.gethostname()}" in (said := capsys.readouterr().err)
            assert "gives no sign of life; going on in its place" in said
            with process(tmp_path) as second:
                assert f"in use by process {os.getpid()} " in second.stdout.readline()


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_clock_that_is_hours_off_changes_nothing(tmp_path, hours):
    """A file of another age than it should have: what counts is whether it is touched."""
    file = tmp_path / heartbeat.NAME
    file.write_text(f"process 1 on elsewhere since 2026-01-01 00:00:00+00:00\n{'0' * 16}\n")
    ahead = time.time() + 3600 * hours
    os.utime(file, (ahead, ahead))
    started = time.monotonic()
    with guard.lock(tmp_path):
        assert (time.monotonic() - started > STALE) == (hours > 0)
    file.write_text("alive")
    done = threading.Event()

    def beat():
        while not done.wait(BEAT):
            os.utime(file, (time.time() + 3600 * abs(hours),) * 2)

    beating = threading.Thread(target=beat)
    beating.start()
    with pytest.raises(config.MachineError, match="in use by another process"), guard.lock(tmp_path):
        pass
    done.set()
    beating.join()


def test_of_many_that_come_at_once_one_gets_it(tmp_path):
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(process(tmp_path)) for _ in range(4)]
        said = [child.stdout.readline().strip() for child in children]
    assert said.count("held") == 1, said
    winner = children[said.index("held")].pid
    assert all(f"in use by process {winner} " in line for line in said if line != "held")


def test_of_two_that_found_it_free_the_later_has_it(tmp_path, monkeypatch):
    """Both have looked; the second writes its name when the first has just written its own."""
    both_looked, write_whole, held = threading.Barrier(2), heartbeat.files.write_whole, []

    def write(file, data):
        both_looked.wait(timeout=20)
        time.sleep(0.1 if threading.current_thread().name == "later" else 0)
        write_whole(file, data)

    def want():
        with contextlib.suppress(config.MachineError), guard.lock(tmp_path):
            held.append(threading.current_thread().name)
            both_done.wait(timeout=20)
            return
        both_done.wait(timeout=20)

    both_done = threading.Barrier(2)
    monkeypatch.setattr(heartbeat.files, "write_whole", write)
    threads = [threading.Thread(target=want, name=name) for name in ("earlier", "later")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held == ["later"]


def test_a_holder_that_slept_and_was_replaced_ends(tmp_path):
    with process(tmp_path) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGSTOP)
        with guard.lock(tmp_path):
            holder.send_signal(signal.SIGCONT)
            assert holder.wait(timeout=20) == 1
            assert f"in use by process {os.getpid()} " in (said := holder.stderr.read())
            assert "took this run for dead; ending this one" in said
            time.sleep(2 * BEAT)
            with process(tmp_path) as third:
                assert f"in use by process {os.getpid()} " in third.stdout.readline()


def test_what_another_hand_wrote_there_is_not_repeated(tmp_path, capsys):
    (tmp_path / heartbeat.NAME).write_bytes(b"process 1 on \x1b[31mhost since \xff")
    os.utime(tmp_path / heartbeat.NAME, (0, 0))
    with guard.lock(tmp_path):
        assert capsys.readouterr().err == f"vitmed: {tmp_path}: another process gives no sign of life; going on in its place\n"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat.files, "write_whole", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, os.strerror(errno.EROFS))))
    with pytest.raises(config.MachineError, match="cannot be locked: Read-only file system"), guard.lock(tmp_path):
        pass
