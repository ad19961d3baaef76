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
    for config in ("vit2d.py:dataset=phantom2d,patch=28,pretrained=", "vit3d.py:dataset=phantom3d,patch=28,pretrained="):
        workdir = tmp_path / config.partition(".")[0]
        command = [sys.executable, "-m", "vitmed.main", f"--config=configs/{config}", f"--workdir={workdir}", *small]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
        assert (workdir / "result.json").exists()
    where = subprocess.run(
        [sys.executable, "-c", "import vitmed; print(vitmed.__file__)"], cwd=tmp_path, env=environment, check=True, capture_output=True
    )
    assert where.stdout.decode().startswith(str(tmp_path))
