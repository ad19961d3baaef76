"""A command in a process of its own, with signals passed on to it: what breaks it leaves this one to tell."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence

from vitmed import cli
from vitmed import config as config_lib


def run(command: Sequence[str], *, stdout: int | None = subprocess.DEVNULL) -> tuple[int, str]:
    """Run a command in a process of its own and pass signals on to it: (exit status, what it complained of).

    It writes to this process's stderr, be that a terminal or not, and to `stdout` (None: this process's too). Stopped where a signal
    came, or where the command says that one did.
    """
    received: list[int] = []
    child: subprocess.Popen | None = None

    def forward(signum: int, _: object) -> None:
        received.append(signum)
        if child is not None:
            child.send_signal(signal.SIGTERM if signum == signal.SIGHUP else signum)

    with tempfile.TemporaryFile() as words:
        environment = os.environ | {cli.LAST_WORDS: str(words.fileno())}
        passed_on = [one for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]  # nohup
        former = {signum: signal.signal(signum, forward) for signum in passed_on}
        try:
            # A session of its own: a terminal's Ctrl-C reaches this process alone, which passes it on once.
            child = subprocess.Popen(command, stdout=stdout, start_new_session=True, env=environment, pass_fds=[words.fileno()])
            if received:
                child.terminate()  # it came before there was a child
            status = child.wait()
        finally:
            for signum, handler in former.items():
                signal.signal(signum, handler)
        words.seek(0)
        said = words.read().decode(errors="replace")
    if received or status in (75, 130):
        raise config_lib.Stopped(signal.SIGINT if signal.SIGINT in received or status == 130 else signal.SIGTERM)
    return status, said
