"""Flags, and how a command ends: the one line on stderr and the exit status that the contract gives to what users and machines cause."""

import argparse
import contextlib
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vitmed import config

EXIT_OF_SIGNAL = {signal.SIGTERM: 75, signal.SIGINT: 130}
LAST_WORDS = "VITMED_LAST_WORDS"  # in the environment of a sweep's point: the open file in which the sweep looks for its complaint


# XLA's CPU compiler then works on what a program calls twice, as a step's two lanes are, once and not twice.
SHARED_CALLS = "xla_cpu_flatten_after_fusion"


def compile_calls_once() -> None:
    """Add SHARED_CALLS to the flags that XLA reads when JAX first looks for devices; the user's own stay as they are.

    XLA_FLAGS that name a file of flags, as they may, are left alone: nothing can stand beside it.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if SHARED_CALLS not in flags and (not flags or flags.startswith("-")):
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_extra_options={SHARED_CALLS}".strip()


class Parser(argparse.ArgumentParser):
    """argparse whose errors are InputErrors: one line, exit status 2."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise config.InputError(f"{message}; see {self.prog} --help")


def parse_flags(parser: Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The parser's own flags, and the overrides given as `--config.field=value` or `--config.field value`."""
    namespace, rest = parser.parse_known_args(list(argv))
    overrides: dict[str, str] = {}
    while rest:
        flag, separator, value = rest.pop(0).partition("=")
        if not flag.startswith("--config.") or not flag.removeprefix("--config."):
            known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
            raise config.InputError(f"{flag}: no such flag; {config.nearest(flag, known)}")
        if not separator:
            if not rest:
                raise config.InputError(f"{flag}: has no value; write {flag}=VALUE")
            value = rest.pop(0)
        overrides[flag.removeprefix("--config.")] = value
    return namespace, overrides


def file_to_write(flag: str, name: str) -> pathlib.Path:
    """The file that a flag names; InputError, before any work is done, where none can be written there."""
    path = pathlib.Path(name).expanduser()
    if not name or path.is_dir() or not path.absolute().parent.is_dir():
        raise config.InputError(f"{flag}={name}: not a file in an existing folder; name one")
    return path


def run_cli(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Call a CLI's main and turn what users and machines cause into one line on stderr and the contract's exit status.

    Wherever `main` handles no signals itself there is nothing to save, and SIGTERM and SIGINT end the process at once.
    """

    def stop(signum: int, frame: object) -> NoReturn:
        os._exit(EXIT_OF_SIGNAL[signum])  # an exception would be raised within whatever library is being imported, and break it

    former = {signum: signal.signal(signum, stop) for signum in EXIT_OF_SIGNAL if signal.getsignal(signum) != signal.SIG_IGN}
    with contextlib.suppress(AttributeError):  # a stream that is no text file
        sys.stdout.reconfigure(errors="replace")  # a terminal without ± must not end a run that took hours
    compile_calls_once()
    try:
        return main(argv)
    except config.InputError as error:
        return _complain(error, 2)
    except config.LostError as error:
        return _complain(error, 75)
    except config.MachineError as error:
        return _complain(error, 1)
    except MemoryError as error:
        return _complain(f"out of memory ({error}); lower train.micro_batch_size or eval.batch_size, or take a larger patch", 1)
    except OSError as error:  # a full disk, a folder removed under the run, a lost network drive
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}; mend that and run the same command again", 1)
    except config.Stopped as stopped:
        return EXIT_OF_SIGNAL[stopped.signum]
    except KeyboardInterrupt:
        return EXIT_OF_SIGNAL[signal.SIGINT]
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


def _complain(message: object, status: int) -> int:
    line = config.one_line(message)
    if not getattr(message, "told", False):  # process 0 of the run says it for all
        print(f"vitmed: {line}", file=sys.stderr)
    with contextlib.suppress(KeyError, ValueError, OSError):
        os.write(int(os.environ[LAST_WORDS]), line.encode())
    return status
