"""One process per folder and signals, with real processes, locks and signals."""

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
from vitmed.runs import guard

HOLD = """
import sys, time
from vitmed.runs import guard
with guard.lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""
FORK = """
import os, sys
from vitmed.runs import guard
with guard.lock(sys.argv[1]):
    child = os.fork()
    if not child:  # lives, with its copy of the descriptor, until the test closes its standard input
        sys.stdin.read()
        os._exit(0)
print("held", flush=True)
sys.stdin.read()
"""
START = """
import subprocess, sys
from vitmed.runs import guard
with guard.lock(sys.argv[1]):
    subprocess.Popen(["cat"], close_fds=False)  # lives until the test closes its standard input
    print("held", flush=True)
    sys.stdin.readline()
"""
TAKE = """
import sys
from vitmed import config
from vitmed.runs import guard
try:
    with guard.lock(sys.argv[1]):
        print("held")
except config.MachineError as error:
    print(error)
"""
WAIT_FOR_SIGNALS = """
import sys, time
from vitmed.runs import guard
signals = guard.Signals()
with signals:
    print("ready", flush=True)
    seen = None
    while True:
        time.sleep(0.01)
        if seen != signals.requested:
            seen = signals.requested
            print(seen, flush=True)
        if sys.argv[1] == "once" and seen is not None:
            break
print("saved", flush=True)
"""


@contextlib.contextmanager
def process(program, *arguments):
    """A child whose first line has been read (which says that it is where the test wants it)."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            first = child.stdout.readline().strip()
            assert first in ("held", "ready"), child.stderr.read()
            yield child
        finally:
            child.kill()


def take(path):
    return subprocess.run([sys.executable, "-c", TAKE, str(path)], capture_output=True, text=True, timeout=20).stdout.strip()


# --- the lock


def test_a_second_process_is_refused_while_the_first_holds(tmp_path):
    with process(HOLD, tmp_path) as holder:
        with pytest.raises(config.MachineError) as raised, guard.lock(tmp_path):
            pass
        message = str(raised.value)
        assert f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()} since 20" in message
        assert "wait for it to end" in message
        assert take(tmp_path) == message
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.wait(timeout=20) == 0
        assert take(tmp_path) == "held"


def test_the_lock_of_a_killed_holder_is_taken_over(tmp_path):
    with process(HOLD, tmp_path) as holder:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(timeout=20)
        with guard.lock(tmp_path):
            assert f"process {os.getpid()} " in take(tmp_path)


def test_a_forked_child_does_not_keep_a_released_lock(tmp_path):
    """A lock belongs to every copy of its descriptor: closing one's own would leave it with the child."""
    with process(FORK, tmp_path):
        assert take(tmp_path) == "held"


def test_a_started_program_does_not_keep_the_lock_of_a_killed_holder(tmp_path):
    with process(START, tmp_path) as holder:
        assert f"process {holder.pid} " in take(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=20)
        assert take(tmp_path) == "held"


def test_the_lock_is_for_one_holder_even_within_a_process(tmp_path):
    with guard.lock(tmp_path):
        with pytest.raises(config.MachineError, match=f"process {os.getpid()} "), guard.lock(tmp_path):
            pass
        assert f"process {os.getpid()} " in take(tmp_path)  # the refused attempt released nothing
    with guard.lock(tmp_path):
        pass


def test_the_lock_is_released_by_an_error(tmp_path):
    with pytest.raises(KeyError), guard.lock(tmp_path):
        raise KeyError
    assert take(tmp_path) == "held"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\xff"])
def test_a_lock_file_of_another_hand_still_locks(tmp_path, content):
    with process(HOLD, tmp_path):
        (tmp_path / guard.LOCK_NAME).write_text(content)
        with pytest.raises(config.MachineError, match="in use by another process"), guard.lock(tmp_path):
            pass


def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch):
    with pytest.raises(config.MachineError, match="cannot be locked: No such file"), guard.lock(tmp_path / "absent"):
        pass

    def broken(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(config.MachineError, match="cannot be locked: Input/output error"), guard.lock(tmp_path):
        pass


# --- signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noticed_and_the_process_ends_by_itself(signum):
    with process(WAIT_FOR_SIGNALS, "once") as child:
        child.send_signal(signum)
        output, errors = child.communicate(timeout=20)
        assert output.split() == [str(int(signum)), "saved"]
        assert errors == ""
        assert child.returncode == 0


def test_a_second_interrupt_ends_at_once():
    with process(WAIT_FOR_SIGNALS, "forever") as child:
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "2\n"
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate(timeout=20)
        assert output == ""
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert child.returncode == -signal.SIGINT


def test_the_first_signal_counts_and_terminate_never_interrupts():
    with process(WAIT_FOR_SIGNALS, "forever") as child:
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == f"{int(signal.SIGTERM)}\n"
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            child.send_signal(signum)
            time.sleep(0.1)
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        output, _ = child.communicate(timeout=20)
        assert output == ""  # `requested` never changed
        assert child.returncode == -signal.SIGINT


def test_former_handlers_return():
    def mine(signum, frame):
        pass

    former = {signum: signal.signal(signum, mine) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        with guard.Signals() as signals:
            assert signal.getsignal(signal.SIGTERM) is not mine
            assert signals.requested is None
            signal.raise_signal(signal.SIGTERM)
            assert signals.requested == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is mine
        with guard.Signals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert signals.requested == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


def test_other_threads_leave_the_handlers_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def body():
        with guard.Signals() as signals:
            seen.append((signal.getsignal(signal.SIGTERM), signals.requested))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(before, None)]
