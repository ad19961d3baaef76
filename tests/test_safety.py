"""What no file of vitmed may do, read from the sources: run what data say, and write a file that a kill could leave half there."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
RUN_CODE = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads", "yaml.load", "joblib.load"}
WRITE = {"write_text", "write_bytes", "savez_compressed", "tofile", "save_file", "savetxt"}
# Who writes otherwise than by runs.files.write_whole: that itself, Orbax's checkpoints, the heartbeat, a download that goes on, and the
# cache of prepared images, which data, who know no runs, write beside it and rename.
WRITERS = {
    "vitmed/runs/files.py",
    "vitmed/runs/checkpoint.py",
    "vitmed/runs/heartbeat.py",
    "vitmed/data/download.py",
    "vitmed/data/prepared.py",
}


def opens_to_write(node):
    """Whether a call is of `open` or a path's `open` with a mode that writes."""
    given = [argument for argument in (*node.args, *(keyword.value for keyword in node.keywords)) if isinstance(argument, ast.Constant)]
    modes = [argument.value for argument in given if isinstance(argument.value, str) and set(argument.value) <= set("rwxabt+")]
    return any(set(mode) & set("wxa+") for mode in modes)


def faults(path, source):
    """Yield what is wrong in a file's calls."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        last = name.rpartition(".")[2]
        if name in RUN_CODE or options.get("shell", "False") != "False" or options.get("allow_pickle", "False") != "False":
            yield f"{path}:{node.lineno}: {name} can run what data say"
        if name in ("np.load", "numpy.load") and "allow_pickle" not in options:
            yield f"{path}:{node.lineno}: {name} without allow_pickle=False"
        if path not in WRITERS and (last in WRITE or (last == "open" and opens_to_write(node))):
            yield f"{path}:{node.lineno}: {name} can leave a file half written; use runs.files.write_whole"


def test_no_source_runs_what_data_say_or_writes_by_halves():
    sources = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in sorted((ROOT / "vitmed").rglob("*.py"))}
    assert set(sources) > WRITERS
    assert [fault for path, source in sources.items() for fault in faults(path, source)] == []


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("eval(text)", "can run"),
        ("import pickle\npickle.load(file)", "can run"),
        ("subprocess.run(text, shell=True)", "can run"),
        ("np.load(path, allow_pickle=True)", "can run"),
        ("np.load(path)", "without"),
        ("open(path, 'w').write(text)", "half"),
        ("path.open(mode='ab')", "half"),
        ("path.write_text(text)", "half"),
        ("np.savez_compressed(path, a=a)", "half"),
    ],
)
def test_the_rule_finds(source, says):
    assert [says in fault for fault in faults("vitmed/data/a.py", source)] == [True]


@pytest.mark.parametrize(
    "source", ["open(path, 'rb')", "archive.open(name)", "np.load(path, allow_pickle=False)", "jitted.compile()", "re.compile(x)"]
)
def test_the_rule_lets_pass(source):
    assert list(faults("vitmed/data/a.py", source)) == []
