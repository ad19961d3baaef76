"""The package as users get it: a wheel, installed outside of the checkout."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def test_an_installed_wheel_finds_its_configs_and_its_schema(tmp_path):
    subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={tmp_path}", str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("vitmed-*.whl")
    subprocess.run([*PIP, "install", "--no-deps", f"--target={tmp_path / 'site'}", str(wheel)], check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    small = ["--config.model.variant=vit_micro", "--config.train.epochs=1", "--config.train.batch_size=600", "--config.seeds=0"]
    workdir, main = tmp_path / "run", [sys.executable, "-m", "vitmed.main"]
    command = [*main, "--config=configs/vit3d.py:dataset=phantom3d,patch=28,pretrained=", f"--workdir={workdir}", *small]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert (workdir / "result.json").exists()
    listed = subprocess.run(
        [*main, "--config=configs/folds2d.py:dataset=phantom2d", "--list"], cwd=tmp_path, env=environment, capture_output=True
    )
    assert b"data.folds=5: must be 0 with phantom2d" in listed.stderr  # it found the config, and the one that it is built on
    where = subprocess.run(
        [sys.executable, "-c", "import vitmed; print(vitmed.__file__)"], cwd=tmp_path, env=environment, check=True, capture_output=True
    )
    assert where.stdout.decode().startswith(str(tmp_path))
