"""What a run leaves on disk: one schema, every file written whole or not at all, and read back with its faults named.

A folder belongs to one configuration: a run with another one is refused before anything is written. Files:
config.json, model.json (the network, what it was fed, what became of pretrained weights), metrics.jsonl (a line per epoch), checkpoints/,
examples.csv (of own data: the file of each row), predictions/{split}.npz, weights/seed{S}.safetensors (the best parameters),
calibration.json, result.json, and failure.json where a sweep's point failed.
`R` runs (one per seed), `N` examples, `L` labels, `K` classes.
"""

import hashlib
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vitmed import config as config_lib
from vitmed import fields as fields_lib
from vitmed import npz
from vitmed.runs import examples as examples_lib
from vitmed.runs import files, schemas

SCHEMA_VERSION, CALIBRATION_VERSION = 1, 1  # of result.json and calibration.json
MAY_CHANGE = (
    "data.cache",
    "data.root",
    "model.attention",
    "mesh",
    "tracking",
    "train.checkpoint_seconds",
    "train.micro_batch_size",
    "train.remat",
)  # where and how, not what: a name stands for all below it
SHOWN_DIFFERENCES = 5
AT_PATCH = "patches"  # the folder within a run's for those of its other patch sizes


class Predictions(NamedTuple):
    """Probabilities of one split: labels int64 [N, L], probabilities float32 [R, N, K], seeds int64 [R]."""

    labels: np.ndarray
    probabilities: np.ndarray
    seeds: np.ndarray


def digest(config: Mapping[str, Any]) -> str:
    """Return 16 hex digits of the SHA-256 of a config's canonical JSON (sorted, tuples as lists) without what MAY_CHANGE."""
    return hashlib.sha256(_json_text(_settled(config)).encode()).hexdigest()[:16]


def _settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a nested config by dotted name, without those that MAY_CHANGE between calls."""
    flat = config_lib.flatten(config)
    return {name: value for name, value in flat.items() if not any(f"{name}.".startswith(f"{free}.") for free in MAY_CHANGE)}


def _json_text(value: Any) -> str:
    """Encode a setting or all of them, the same text for the same value; InputError for numbers that JSON does not have."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise config_lib.InputError("a setting is NaN or infinite; give a finite number") from error


def _predictions_fault(predictions: Predictions) -> str | None:
    """Say what in a split's arrays does not fit together; None if all does."""
    labels, probabilities, seeds = predictions
    shapes = f"labels {labels.shape}, probabilities {probabilities.shape}, seeds {seeds.shape}"
    if (labels.ndim, probabilities.ndim, seeds.ndim) != (2, 3, 1) or probabilities.shape[:2] != (len(seeds), len(labels)):
        return f"expected labels [N, L], probabilities [R, N, K] and seeds [R], got {shapes}"
    kinds = (labels.dtype.kind, probabilities.dtype.kind, seeds.dtype.kind)
    if kinds[0] not in "iub" or kinds[1] != "f" or kinds[2] not in "iu":
        return f"expected integer labels, float probabilities and integer seeds, got {labels.dtype}, {probabilities.dtype}, {seeds.dtype}"
    return None


class RunFolder:
    """The folder of one run (all seeds): where its files lie, how they are written and read.

    One that does not `write`, as in all but one of the processes of a run, reads and checks and otherwise does nothing.
    """

    def __init__(self, path: str | os.PathLike, *, writes: bool = True):
        self.path = pathlib.Path(path)
        self.writes = writes
        self.config = self.path / "config.json"
        self.model = self.path / "model.json"
        self.metrics = self.path / "metrics.jsonl"
        self.examples = self.path / "examples.csv"
        self.checkpoints = self._checkpoints()
        self.calibration = self.path / "calibration.json"
        self.result = self.path / "result.json"
        self.failure = self.path / "failure.json"

    def _checkpoints(self) -> pathlib.Path:
        """Its own, or of one of a run's patch sizes (`at_patch`), which has none, the run's."""
        own, path = self.path / "checkpoints", self.path.resolve()
        if path.parent.name != AT_PATCH or own.exists() or not self.config.is_file():
            return own
        around = path.parent.parent
        return around / own.name if (around / "config.json").is_file() else own

    def at_patch(self, patch_size: str) -> "RunFolder":
        """The folder within for what the run's network does at another of its patch sizes: as if it were a run's."""
        return RunFolder(self.path / AT_PATCH / patch_size, writes=self.writes)

    def predictions(self, split: str) -> pathlib.Path:
        """Return where the predictions of a split lie."""
        return self.path / "predictions" / f"{split}.npz"

    def weights(self, seed: int) -> pathlib.Path:
        """Return where the best parameters of a seed lie."""
        return self.path / "weights" / f"seed{seed}.safetensors"

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise InputError, writing nothing, if the folder cannot be made or written, or holds a run with another config."""
        refused = f"{self.path} cannot be a run's folder"
        files.check_folder(self.path, refused)
        try:
            holds_run = self.config.exists()
        except OSError as error:
            raise config_lib.InputError(f"{refused}: {error.strerror or error}; choose another") from error
        if holds_run:
            self._check_same(config)
            if self.checkpoints.parent != self.path and not self.result.exists():
                raise config_lib.InputError(f"{refused}: it is of {self.checkpoints.parent}, which is not finished; run that again")
            return
        for path in (self.checkpoints, self.result):
            if path.exists():
                raise config_lib.InputError(f"{refused}: {path} is of a run, but there is no config.json; choose another, or bring it back")

    def tidy(self) -> None:
        """Remove what killed processes left of files that they were writing; for who holds the folder's lock."""
        for path in (self.path, *self.at_patch("").path.glob("*")) if self.writes else ():
            for written in (path, path / "predictions", path / "weights"):
                files.remove_leftovers(written)

    def _write(self, path: pathlib.Path, data: bytes, *, make_parent: bool = False) -> None:
        if self.writes:
            files.write_whole(path, data, make_parent=make_parent)

    def _check_same(self, config: Mapping[str, Any]) -> None:
        configs = (fields_lib.completed(self.read_config()), fields_lib.completed(config))
        there, came = ({name: _json_text(value) for name, value in _settled(c).items()} for c in configs)
        names = sorted(name for name in there.keys() | came.keys() if there.get(name) != came.get(name))
        shown = [f"{name} is {there.get(name, 'absent')} there, {came.get(name, 'absent')} here" for name in names[:SHOWN_DIFFERENCES]]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        if names:
            raise config_lib.InputError(
                f"{self.path} holds a run with other settings: {'; '.join(shown)}{more}. "
                "Give another --workdir, or the same settings to continue"
            )

    def create(self, config: Mapping[str, Any]) -> None:
        """Make the folder and put config.json there if it is not; InputError if it cannot be made, MachineError if the disk is full."""
        data = files.json_bytes(json.loads(_json_text(config)))  # sorted; checked before anything is made
        if not self.writes:
            return
        files.make_folder(self.path)
        if not self.config.exists():
            self._write(self.config, data)

    def read_config(self) -> dict[str, Any]:
        """Return the config that the run was started with (lists for tuples), as written; InputError if absent or broken."""
        try:
            return files.parse_json(files.read(self.config), where=str(self.config))
        except FileNotFoundError as error:
            raise config_lib.InputError(f"{self.path} holds no run: there is no config.json in it") from error

    def write_model(self, record: Mapping[str, Any]) -> None:
        """Write what the network is."""
        self._write(self.model, files.json_bytes(files.json_ready(record)))

    def read_model(self) -> dict[str, Any]:
        """Return what the network is; InputError if absent or broken."""
        try:
            return files.parse_json(files.read(self.model), where=str(self.model))
        except FileNotFoundError as error:
            raise config_lib.InputError(f"{self.model} is missing; restore it from a copy or run into another folder") from error

    def write_weights(self, seed: int, data: bytes) -> None:
        """Write the file of one seed's parameters."""
        self._write(self.weights(seed), data, make_parent=True)

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a line per epoch, the whole file anew, so that a line is never half there; NaN and infinity become null."""
        lines = [json.dumps(files.json_ready(row), allow_nan=False) + "\n" for row in rows]
        self._write(self.metrics, "".join(lines).encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows written, none if there is no file; InputError that names the line if one is broken."""
        try:
            lines = files.read(self.metrics).splitlines()
        except FileNotFoundError:
            return []
        return [files.parse_json(line, where=f"{self.metrics} line {number}") for number, line in enumerate(lines, start=1)]

    def write_examples(self, examples: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
        """Write which file each row of a split's predictions is of."""
        self._write(self.examples, examples_lib.pack(examples))

    def read_examples(self) -> list[dict[str, str]]:
        """Return the rows of examples.csv; InputError if it is absent or broken."""
        return examples_lib.read(self.examples)

    def write_predictions(self, split: str, *, labels: np.ndarray, probabilities: np.ndarray, seeds: Sequence[int]) -> None:
        """Write labels int [N, L], probabilities [R, N, K] (as float32) and seeds [R]; the same arrays give the same bytes."""
        predictions = Predictions(np.asarray(labels), np.asarray(probabilities), np.asarray(seeds))
        if fault := _predictions_fault(predictions):
            raise ValueError(fault)
        buffer = io.BytesIO()
        dtypes = {"labels": np.int64, "probabilities": np.float32, "seeds": np.int64}
        np.savez(buffer, **{name: np.ascontiguousarray(getattr(predictions, name), dtype) for name, dtype in dtypes.items()})
        self._write(self.predictions(split), buffer.getvalue(), make_parent=True)

    def read_predictions(self, split: str) -> Predictions:
        """Return the predictions of a split; InputError if they are absent, damaged (checksums are verified) or do not fit."""
        path = self.predictions(split)
        try:
            data = files.read(path)
        except FileNotFoundError as error:
            there = ", ".join(sorted(file.stem for file in path.parent.glob("[!.]*.npz"))) or "none"
            raise config_lib.InputError(f"{self.path} holds no predictions of split {split!r}; there are: {there}") from error
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if damaged := archive.testzip():  # before a header is believed
                    raise ValueError(f"the checksum of {damaged} does not match")
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):  # nor may it unpack to any size
                    raise ValueError("it is compressed, which vitmed's are not")
                for name in Predictions._fields:
                    npz.read_header(archive, name)
                predictions = Predictions(*(npz.read_array(archive, name) for name in Predictions._fields))
        except (*npz.DAMAGE, OSError) as error:
            raise config_lib.InputError(
                f"{path} is broken: {config_lib.one_line(error)[:400] or type(error).__name__}; restore it from a copy"
            ) from error
        if fault := _predictions_fault(predictions):
            raise config_lib.InputError(f"{path} does not hold predictions: {fault}")
        return predictions

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json after holding it against the schema (NaN becomes null); ValueError if it does not match."""
        self._write_checked("result", self.result, result)
        if self.writes:
            self.failure.unlink(missing_ok=True)

    def write_calibration(self, record: Mapping[str, Any]) -> None:
        """Write temperatures and operating points, see study/operating.py; ValueError if they do not match the schema."""
        self._write_checked("calibration", self.calibration, record)

    def _write_checked(self, name: str, path: pathlib.Path, record: Mapping[str, Any]) -> None:
        ready = files.json_ready(record)
        if fault := schemas.fault(name, ready):
            raise ValueError(f"the {name} does not match runs/{name}.schema.json: {fault}")
        self._write(path, files.json_bytes(ready))

    def write_failure(self, record: Mapping[str, Any]) -> None:
        """Write why the run could not be finished; a result removes it."""
        files.make_folder(self.path)
        files.write_whole(self.failure, files.json_bytes(record))

    def read_failure(self) -> dict[str, Any] | None:
        """Return what write_failure wrote, None if the run has not failed; InputError if it is broken."""
        try:
            return files.parse_json(files.read(self.failure), where=str(self.failure))
        except FileNotFoundError:
            return None

    def read_result(self) -> dict[str, Any] | None:
        """Return the result, None if there is none; InputError if it is broken, does not match or is of a newer schema."""
        return self._read_checked("result", self.result, SCHEMA_VERSION)

    def read_calibration(self) -> dict[str, Any] | None:
        """Return the calibration, None of a run that has none; InputError if it is broken, does not match or is of a newer schema."""
        return self._read_checked("calibration", self.calibration, CALIBRATION_VERSION)

    def _read_checked(self, name: str, path: pathlib.Path, newest: int) -> dict[str, Any] | None:
        try:
            record = files.parse_json(files.read(path), where=str(path))
        except FileNotFoundError:
            return None
        version = record.get("schema_version")
        if isinstance(version, int) and version > newest:
            raise config_lib.InputError(f"{path} has schema_version {version}, this vitmed reads up to {newest}; install a newer vitmed")
        if fault := schemas.fault(name, record):
            raise config_lib.InputError(f"{path} does not match the schema: {fault}")
        return record
