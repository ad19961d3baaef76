"""A sweep to render, and a PATH of fake commands among which what is rendered runs: they write down their calls and answer as told."""

import os
import pathlib
import subprocess

from launch import kubernetes, manifest, skypilot, sweep, tpu
from vitmed import cli

NAMES = tuple(f"set-patch{patch}" for patch in (28, 14, 7, 4))
MANIFEST = manifest.Manifest(
    "configs/quickstart.py",
    {"data.root": "/it's $(here): 'all'", "train.epochs": "1"},
    tuple(manifest.Point(name, f"patch={name[9:]}", 1.0, 2.0) for name in NAMES),
    ((NAMES[0],), (NAMES[1], NAMES[2]), (), (NAMES[3],)),
)
NEEDED = {
    kubernetes: ["--image=registry.example.com/vitmed:1", "--claim=vitmed"],
    skypilot: ["--storage=gs://bucket"],
    tpu: ["--zone=us-central1-a", "--share=10.0.0.2:/vitmed"],
}


def options_of(engine, *given, workdir="/share/runs/study", tasks=(0, 1, 3)):
    """What launch/sweep.py gives an engine."""
    argv = [f"--workdir={workdir}", *NEEDED[engine], *given]
    options = cli.parse_flags(sweep.make_parser(engine), argv)[0]
    options.manifest, options.tasks = f"{workdir}/manifest.json", tasks
    return options


def render(engine, *given, **more):
    """The files of an engine."""
    return engine.render(MANIFEST, options_of(engine, *given, **more))


def write(folder, files):
    """Write the files of an engine."""
    for name, text in files.items():
        (folder / name).write_text(text)


# The first answer whose pattern fits is taken, and used up unless it has a star before its status.
# `stop`, `hang` and `slow` are for signals.
FAKE = r"""#!/bin/bash
call="$(basename "$0") $*"
echo "$call" >> "$FAKES/calls"
{ flock 9; : > "$FAKES/left"; answer=; found=
while IFS=$'\t' read -r pattern status output; do
    if [ -z "$found" ] && [[ "$call" == $pattern ]]; then
        found=1; answer=$status; said=$output
        case $status in \**) ;; *) continue ;; esac
    fi
    printf '%s\t%s\t%s\n' "$pattern" "$status" "$output" >> "$FAKES/left"
done < "$FAKES/answers"
mv "$FAKES/left" "$FAKES/answers"; } 9> "$FAKES/lock"
case ${answer#\*} in 0|'') to=1 ;; *) to=2 ;; esac # a complaint goes to stderr
[ -z "$said" ] || echo "$said" >&$to
case $answer in
    hang) sleep_for_real 60; exit 0 ;;
    slow) sleep_for_real 2; echo "$call ended" >> "$FAKES/calls"; exit 0 ;;
    stop) trap 'echo "$call got SIGTERM" >> "$FAKES/calls"; kill $!; exit 75' TERM
        sleep_for_real 60 & touch "$FAKES/listening"; wait $!; exit 0 ;;
esac
answer=${answer#\*}
exit "${answer:-0}"
"""


class Fakes:
    """A folder of fake commands, to go before PATH; `calls` are the lines of what was called."""

    def __init__(self, folder: pathlib.Path, *commands: str):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        for command in commands:
            self.add(self.bin / command)
        (self.bin / "sleep_for_real").symlink_to("/bin/sleep")
        (folder / "answers").touch()
        (folder / "calls").touch()

    def add(self, path: pathlib.Path) -> None:
        """Put a fake command somewhere else."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE)
        path.chmod(0o755)

    def answer(self, pattern: str, status: int | str = 0, output: str = "") -> None:
        """What the next call of this form gives; "*0" is for all of them."""
        with open(self.folder / "answers", "a", encoding="utf-8") as answers:
            answers.write(f"{pattern}\t{status}\t{output}\n")

    @property
    def listening(self) -> bool:
        """Whether a command that answers `stop` waits for its signal."""
        return (self.folder / "listening").exists()

    @property
    def calls(self) -> list[str]:
        """The calls until now."""
        return (self.folder / "calls").read_text().splitlines()

    def environment(self, **more: str) -> dict[str, str]:
        """The environment in which the fakes are found first."""
        return os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}", "FAKES": str(self.folder), **more}

    def run(self, command: list[str], **environment: str) -> subprocess.CompletedProcess:
        """Run a command among the fakes."""
        return subprocess.run(command, env=self.environment(**environment), capture_output=True, text=True, timeout=60)

    def start(self, command: list[str], **environment: str) -> subprocess.Popen:
        """Start a command among the fakes, in a session of its own."""
        return subprocess.Popen(
            command,
            env=self.environment(**environment),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
