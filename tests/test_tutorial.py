"""docs/tutorial.md, every command of it, as a reader would type them one after another."""

import csv
import os
import pathlib
import re
import subprocess
import sys

import nibabel
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent


def blocks():
    """The shell blocks of the tutorial, in order."""
    return re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_every_command_of_the_tutorial(tmp_path):
    """With two epochs instead of sixty; what the numbers then are is not looked at."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert len(blocks()) == 4
    said = {}
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    for index, block in enumerate(blocks()):
        command = block.replace("train.epochs=60", "train.epochs=2").replace(".venv/bin/python", sys.executable)
        made = subprocess.run(["bash", "-euc", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert made.returncode == 0, f"{command}\n{made.stdout}\n{made.stderr}"
        said[index] = made
    assert said[0].stdout.splitlines()[:2] == ["path,label,group,mask", "scan/00.nii.gz,specks,patient00,mask/00.nii.gz"]
    assert "60 examples, binary" in said[1].stderr + said[1].stdout
    assert "stored shapes: 28x28x28 (60)" in said[1].stderr + said[1].stdout
    assert (tmp_path / "report/index.html").is_file()
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 4
    assert {row["label"] for row in rows} <= {"blob", "specks"}
    assert all(0 <= float(row["calibrated_specks"]) <= 1 and row["positive_at_youden"] in ("0", "1") for row in rows)
    heats = sorted((tmp_path / "predictions_heatmaps").glob("*.nii.gz"))
    assert len(heats) == 4
    heat, scan = nibabel.load(heats[0]), nibabel.load(tmp_path / "new" / "00.nii.gz")
    assert heat.shape == scan.shape
    np.testing.assert_allclose(heat.affine, scan.affine)
