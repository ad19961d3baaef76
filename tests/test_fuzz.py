"""Every reader of files that others made, given damaged and hostile ones: it reads or refuses in a line, and does nothing else.

VITMED_FUZZ is how many inputs each reader gets (in `make torture` 1,000, 13,000 in all), VITMED_SEED what they are drawn from.
"""

import hashlib
import io
import json
import os
import pathlib
import random
import shutil
import zlib

import made_runs
import numpy as np
import own_files
import PIL.Image
import pytest
import safetensors.numpy
import tifffile
from fuzzing import Watch, mutated
from test_medmnist import arrays_of
from test_tensors import VALUES, torch_zip, whole

from vitmed import network
from vitmed.data import listing, preparation, sources
from vitmed.models import build, tensors
from vitmed.runs import checkpoint, folder, heartbeat
from vitmed.study import collection, operating

INPUTS = int(os.environ.get("VITMED_FUZZ", "30"))
SEED = int(os.environ.get("VITMED_SEED", "0"))
WEIGHTS = {"blocks.0.attn.qkv.weight": VALUES.astype(np.float32), "head.bias": VALUES[0].astype(np.float16)}


@pytest.fixture(scope="module")
def watch():
    return Watch()


def saved(save, arrays):
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def torch_bytes(path):
    return torch_zip(path, {"state_dict": {name: whole(name, array) for name, array in WEIGHTS.items()}}, WEIGHTS).read_bytes()


def read_weights(path):
    with tensors.opened(path) as file:
        for tensor in file.tensors.values():
            tensor.read()


def read_medmnist(path):
    return sources.load("breastmnist", size=28, root=str(path.parent), verify=False)


def read_volume(path):
    return preparation.prepare(path, preparation.Preparation(rank=3, num_channels=1, size=(4,)))


PIL.Image.init()  # it imports its decoders at the first file that none of the usual ones takes


def read_picture(path):
    return preparation.prepare(path, preparation.Preparation(rank=2, num_channels=3, size=(4,)))


def read_table(path):
    return listing.labelled(path, 2)


def written(write, values):
    """The bytes of a file that `write(path, values)` makes."""

    def make(path):
        write(path, values)
        return [path.read_bytes()]

    return make


def read_run(path):
    """The whole of a run's folder, as a report reads it, and what it takes to evaluate it."""
    run = path.parent if path.parent.name != "predictions" else path.parent.parent
    runs, faults = collection.read_all([run])
    assert runs or faults
    run_folder = folder.RunFolder(run)
    run_folder.check(run_folder.read_config())


def read_calibrated(path):
    """The calibration and what prediction does with it."""
    record = operating.of_run(folder.RunFolder(path.parent), task="binary", seeds=[0, 1, 2])
    calibrated = operating.apply(record, np.full((3, 4, record["num_classes"]), 0.5)).ensemble
    return operating.decide(record, calibrated, rule="youden")


def read_model(path):
    return network.of_record(folder.RunFolder(path.parent).read_model(), str(path))


def read_failure(path):
    return folder.RunFolder(path.parent).read_failure()


def read_seal(path):
    """What is not the seal of its step is said to be wrong, and nothing raised."""
    right = {"array": hashlib.sha256(b"values").hexdigest()}
    try:
        whole_seal = json.loads(path.read_bytes()) == right
    except (ValueError, RecursionError):
        whole_seal = False
    assert (checkpoint.defect(path.parent) is None) == whole_seal


def read_lock(path):
    assert heartbeat.signed_by(path.read_bytes()).isprintable()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, a checkpoint's seal and locks: whole files to be damaged."""
    path = tmp_path_factory.mktemp("fuzz") / "run"
    labels, probabilities = made_runs.write(path)
    folder.RunFolder(path).write_calibration(operating.fit("binary", labels, probabilities, seeds=(0, 1, 2)))
    described = network.Network(build.variant("vit_ti"), (0.5,), (0.5,), description=sources.describe("breastmnist", 28))
    folder.RunFolder(path).write_model(described.record(None))
    (path / "failure.json").write_text(json.dumps({"ended": "exit status 1", "said": None}))
    (path / "sealed").mkdir()
    (path / "sealed" / "array").write_bytes(b"values")
    (path / "sealed" / checkpoint.SEAL).write_text(json.dumps({"array": hashlib.sha256(b"values").hexdigest()}))
    (path / heartbeat.NAME).write_text(f"process 1 on a.host since 2026-01-01 00:00:00+00:00\n{'0' * 16}\n")
    return path


OF_A_RUN = {
    "result.json": read_run,
    "config.json": read_run,
    "metrics.jsonl": read_run,
    "predictions/test.npz": read_run,
    "calibration.json": read_calibrated,
    "failure.json": read_failure,
    "model.json": read_model,
    f"sealed/{checkpoint.SEAL}": read_seal,
    heartbeat.NAME: read_lock,
}
OF_OTHERS = {
    "breastmnist.npz": (
        read_medmnist,
        lambda path: [saved(save, arrays_of("breastmnist", 28)) for save in (np.savez, np.savez_compressed)],
    ),
    "w.safetensors": (read_weights, lambda path: [safetensors.numpy.save(WEIGHTS, {"note": "n"})]),
    "w.npz": (read_weights, lambda path: [saved(np.savez, WEIGHTS)]),
    "a.nii": (read_volume, written(own_files.write_nifti, own_files.landmarks())),
    "a.nii.gz": (read_volume, written(own_files.write_nifti, own_files.landmarks())),
    "a.dcm": (read_volume, written(own_files.write_dicom, own_files.landmarks())),
    "stack.tif": (read_volume, written(tifffile.imwrite, own_files.landmarks())),
    "a.png": (read_picture, written(own_files.write_picture, own_files.landmarks()[0].astype(np.uint8))),
    "a.jpg": (read_picture, written(own_files.write_picture, own_files.landmarks()[0].astype(np.uint8))),
    "labels.csv": (read_table, lambda path: [f"path,label,group\n{path},a,p1\n{path.parent},b,p2\n".encode()]),
    "w.pth": (read_weights, lambda path: [torch_bytes(path)]),
}


def fuzz(watch, path, wholes, reader, capsys):
    """Give the reader INPUTS damaged files at that path; print how they were taken, also where one was not."""
    rng = random.Random(zlib.crc32(path.name.encode()) + SEED)
    before = (watch.accepted, watch.refused)  # Watch.read asserts what must hold of each input
    for whole_file in wholes:
        path.write_bytes(whole_file)
        reader(path)
    try:
        for _ in range(INPUTS):
            content = mutated(rng.choice(wholes), rng)
            path.write_bytes(content)
            watch.read(lambda: reader(path), len(content))
    finally:
        with capsys.disabled():
            accepted, refused = watch.accepted - before[0], watch.refused - before[1]
            print(f"\n{path.name}: VITMED_SEED={SEED}: {accepted + refused} inputs, {accepted} read, {refused} refused")


@pytest.mark.parametrize("name", OF_A_RUN)
def test_damaged_files_of_a_run(name, run, watch, tmp_path, capsys):
    copy = pathlib.Path(shutil.copytree(run, tmp_path / "run"))
    fuzz(watch, copy / name, [(run / name).read_bytes()], OF_A_RUN[name], capsys)


@pytest.mark.parametrize("name", OF_OTHERS)
def test_damaged_files_of_others(name, watch, tmp_path, capsys):
    reader, wholes = OF_OTHERS[name]
    fuzz(watch, tmp_path / name, wholes(tmp_path / name), reader, capsys)
