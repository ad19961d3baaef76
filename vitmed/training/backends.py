"""The places where a run can be shown, behind `writers.Writer`. Each imports its package when it is made."""

import importlib
import io
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.image

from vitmed.runs import files
from vitmed.training import tracking

MOST_AT_ONCE, MOST_PARAMS_AT_ONCE = 1000, 100  # metrics and parameters that MLflow takes in one request
SECONDS_BETWEEN_REQUESTS = 5.0


def _markdown(table: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its header."""
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _pixels(png: bytes) -> Any:
    """A PNG as float [H, W, 3]."""
    return matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3]


class TensorBoard:
    """Event files in a folder: one TensorBoard run per seed, so that a chart has a curve for each, and one for what they share.

    Written by tensorboardX's own writer of events rather than by its SummaryWriter: that one writes in a thread, which dies unseen on a
    full disk, and then blocks whoever goes on adding.
    """

    def __init__(self, folder: pathlib.Path, *, config: Mapping[str, Any], seeds: Sequence[int], step: int):
        self._summary = importlib.import_module("tensorboardX.summary")
        self._events = importlib.import_module("tensorboardX.proto.event_pb2")
        files = importlib.import_module("tensorboardX.event_file_writer")
        self._writers = {}
        for seed in (None, *seeds):
            place = folder / ("run" if seed is None else f"seed{seed}")
            place.mkdir(parents=True, exist_ok=True)
            known = any(place.iterdir())
            # A file's name has the second it was made in: two processes within one must not share it.
            self._writers[seed] = files.EventsWriter(str(place / "events"), f".{os.getpid()}")
            if known:  # hides what a process that was killed wrote beyond its last checkpoint
                self._write(seed, step + 1, session_log=self._events.SessionLog(status=self._events.SessionLog.START))
            elif seed is None:
                table = [("field", "value"), *((field, str(value)) for field, value in config.items())]
                self._add(None, 0, self._summary.text("config", _markdown(table)))
        self.flush()

    def scalars(self, shared: Mapping[str, float], of_seeds: Mapping[str, Mapping[int, float]], *, step: int) -> None:
        """Numbers of all in the one run, those of each seed in its own."""
        for name, value in shared.items():
            self._add(None, step, self._summary.scalar(name, value))
        for name, values in of_seeds.items():
            for seed, value in values.items():
                self._add(seed, step, self._summary.scalar(name, value))

    def flush(self) -> None:
        """Write out what TensorBoard is to see."""
        for writer in self._writers.values():
            writer.flush()

    def conclude(self, tables: tracking.Tables, figures: Mapping[str, bytes], *, step: int) -> None:
        """tracking.Tables as text, figures as images."""
        for name, table in tables.items():
            self._add(None, step, self._summary.text(f"results/{name}", _markdown(table)))
        for name, png in figures.items():
            self._add(None, step, self._summary.image(f"figures/{name}", _pixels(png), dataformats="HWC"))

    def close(self, *, finished: bool) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()

    def _add(self, seed: int | None, step: int, summary: Any) -> None:
        self._write(seed, step, summary=summary)

    def _write(self, seed: int | None, step: int, **what: Any) -> None:
        self._writers[seed].write_event(self._events.Event(wall_time=time.time(), step=step, **what))


class WeightsAndBiases:
    """A run of Weights & Biases, continued under the same id.

    Its steps only ever grow, so that of a run that goes on from a checkpoint those that it already has are left out. All numbers of a step
    go in one row, when the next step's come or an epoch ends.
    """

    def __init__(self, path: pathlib.Path, *, project: str, name: str, config: Mapping[str, Any], run_id: str):
        self._wandb = importlib.import_module("wandb")
        self._run = self._wandb.init(project=project, name=name, id=run_id, resume="allow", dir=str(path), config=dict(config))
        self._first = int(self._run.starting_step or 0)
        self._step, self._row = 0, {}

    def scalars(self, shared: Mapping[str, Any], of_seeds: Mapping[str, Mapping[int, float]], *, step: int) -> None:
        """Numbers, those of seeds under name/seed0."""
        if step != self._step:
            self.flush()
        self._step = step
        self._row |= shared
        self._row |= {f"{name}/seed{seed}": value for name, values in of_seeds.items() for seed, value in values.items()}

    def flush(self) -> None:
        """Send the step's row."""
        if self._row and self._step >= self._first:
            self._run.log(self._row, step=self._step, commit=True)
            self._first = self._step + 1
        self._row = {}

    def conclude(self, tables: tracking.Tables, figures: Mapping[str, bytes], *, step: int) -> None:
        """tracking.Tables and figures, in the row of the step."""
        shown = {
            f"results/{name}": self._wandb.Table(columns=list(lines[0]), data=list(map(list, lines[1:]))) for name, lines in tables.items()
        }
        shown |= {f"figures/{name}": self._wandb.Image(_pixels(png)) for name, png in figures.items()}
        self.scalars(shown, {}, step=step)

    def close(self, *, finished: bool) -> None:
        """End it; a row that is not complete, of a step that comes again, is not sent."""
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow, continued under the same id; each number is logged after the steps that it already has.

    Numbers are sent together: at an epoch's end, or some seconds after the last ones.
    """

    def __init__(self, stored: Callable[[Callable[[], str]], str], *, project: str, name: str, config: Mapping[str, Any]):
        mlflow = importlib.import_module("mlflow")
        self._metric = importlib.import_module("mlflow.entities").Metric
        param = importlib.import_module("mlflow.entities").Param
        self._client = mlflow.MlflowClient()
        created = []

        def make() -> str:
            known = self._client.get_experiment_by_name(project)
            number = self._client.create_experiment(project) if known is None else known.experiment_id
            created.append(self._client.create_run(number, run_name=name).info.run_id)
            return created[0]

        self._run = stored(make)
        self._last: dict[str, int] = {}
        self._pending: list[Any] = []
        self._sent = time.monotonic()
        self._continued = not created
        if created:
            params = [param(key, str(value)[:500]) for key, value in config.items()]  # as much as every store takes
            for first in range(0, len(params), MOST_PARAMS_AT_ONCE):
                self._client.log_batch(self._run, params=params[first : first + MOST_PARAMS_AT_ONCE])
        else:
            self._client.update_run(self._run, status="RUNNING")

    def scalars(self, shared: Mapping[str, float], of_seeds: Mapping[str, Mapping[int, float]], *, step: int) -> None:
        """Numbers, those of seeds under name/seed0."""
        values = dict(shared) | {f"{name}/seed{seed}": value for name, known in of_seeds.items() for seed, value in known.items()}
        now = int(time.time() * 1000)
        for name, value in values.items():
            if step > self._last_step(name):
                self._last[name] = step
                self._pending.append(self._metric(name, value, now, step))
        if time.monotonic() - self._sent >= SECONDS_BETWEEN_REQUESTS:
            self.flush()

    def flush(self) -> None:
        """Send what is pending."""
        pending, self._pending = self._pending, []
        for first in range(0, len(pending), MOST_AT_ONCE):
            self._client.log_batch(self._run, metrics=pending[first : first + MOST_AT_ONCE])
        self._sent = time.monotonic()

    def conclude(self, tables: tracking.Tables, figures: Mapping[str, bytes], *, step: int) -> None:
        """tracking.Tables and figures, as artifacts."""
        for name, table in tables.items():
            self._client.log_text(self._run, _markdown(table) + "\n", f"results/{name}.md")
        with tempfile.TemporaryDirectory() as folder:
            for name, png in figures.items():
                file = pathlib.Path(folder) / f"{name}.png"
                files.write_whole(file, png)
                self._client.log_artifact(self._run, str(file), "figures")

    def close(self, *, finished: bool) -> None:
        """End it."""
        self.flush()
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")

    def _last_step(self, name: str) -> int:
        if name not in self._last:
            history = self._client.get_metric_history(self._run, name) if self._continued else ()
            self._last[name] = max((metric.step for metric in history), default=-1)
        return self._last[name]
