"""What a person sees while a run trains: a progress bar on a terminal, a line now and then elsewhere; all on stderr."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import rich.console
import rich.progress

SECONDS_BETWEEN_LINES = 10.0
Tables = Mapping[str, Sequence[Sequence[str]]]  # by name, each with its header first


def losses_text(losses: Sequence[float | None]) -> str:
    """Losses of all runs in few characters; a dash for a run that failed."""
    return " ".join("-" if loss is None or math.isnan(loss) else f"{loss:.3f}" for loss in losses)


class Observer:
    """What the loop tells whoever follows a run; this one listens to nothing. A context manager around the run."""

    def __enter__(self) -> "Observer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """The run has ended, or is to be continued."""

    def begun(self, step: int) -> None:
        """The run begins, or goes on: all up to this step has been told before."""

    def trained(self, step: int, *, losses: Sequence[float], images_per_second: float) -> None:
        """A chunk ended with this step; the mean losses of its steps, one for each run."""

    def validated(self, row: Mapping[str, Any]) -> None:
        """An epoch ended with this line of metrics.jsonl."""

    def finished(self, test: Mapping[str, Sequence[float | None]], show: Callable[[], Any]) -> None:
        """The run is done: its test metrics, a value for each run, and what makes tables and figures of it."""


class Progress:
    """Steps done of all, time left, images per second and the current losses; a context manager around the loop.

    One that is quiet shows nothing, as in all but one of the processes of a run.
    """

    def __init__(self, label: str, *, total_steps: int, done_steps: int, quiet: bool = False):
        self._quiet = quiet
        self._label, self._total, self._done = label, total_steps, done_steps
        self._started, self._first, self._printed = time.monotonic(), done_steps, 0.0
        self._val = ""
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty() and not self._quiet:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(bar_width=20),
                rich.progress.TaskProgressColumn(),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("{task.fields[detail]}"),
                console=rich.console.Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total, completed=self._done, detail="compiling")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def trained(self, steps: int, *, epoch: int, images_per_second: float, losses: Sequence[float | None]) -> None:
        """`steps` are done in all; the losses [R] are the latest step's."""
        self._done = steps
        detail = f"epoch {epoch}  {images_per_second:.0f} images/s  loss {losses_text(losses)}{self._val}"
        self._show(detail, last=steps == self._total)

    def end(self, text: str) -> None:
        """No steps follow; where not all have been made, the bar is full all the same and `text` says it."""
        if self._done < self._total:
            self._total = self._done
            if self._bar is not None:
                self._bar.update(self._task, total=self._total)
            self.note(text)

    def validated(self, losses: Sequence[float | None]) -> None:
        """The validation losses [R] of the epoch just ended; shown from the next line on."""
        self._val = f"  val {losses_text(losses)}"

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def _show(self, detail: str, *, last: bool) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, detail=detail)
            return
        now = time.monotonic()
        if not self._quiet and (last or now - self._printed >= SECONDS_BETWEEN_LINES):
            self._printed = now
            left = (now - self._started) / max(self._done - self._first, 1) * (self._total - self._done)
            line = f"{self._label}  step {self._done}/{self._total}  {left:.0f} s left  {detail}"
            print(line, file=sys.stderr, flush=True)
