"""Weights by name: folders, a cache made by hand, and the real huggingface_hub against a local server with faults; no network."""

import errno
import hashlib
import http.server
import json
import logging
import os
import shutil
import sys
import threading
import time

import pytest

from vitmed import config
from vitmed.models import hub, known

TI = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
AUGREG = "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"
STEM = TI.partition("/")[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = bytes(range(256)) * 40
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)
NUMBERS = ((0.1, 0.2, 0.3), (0.3, 0.2, 1.0))
OURS, THEIRS = ({f"{prefix}mean": NUMBERS[0], f"{prefix}std": NUMBERS[1]} for prefix in ("", "image_"))


class Handler(http.server.BaseHTTPRequestHandler):
    """The Hub's answers for the server's `files`; `fault` is (status, headers), 'hang', or for one GET 'cut', 'short' or 'changed'."""

    def do_HEAD(self):
        server = self.server
        server.requests.append((self.command, self.path))
        if server.fault == "hang":
            return server.released.wait(20)
        if isinstance(server.fault, tuple):
            return self.answer(*server.fault)
        content = server.files.get(self.path.replace("/resolve/main/", "/"))
        if content is None:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "X-HF-Warning": f"{id(server)}; log in"}
        short = self.command == "GET" and server.fault == "short"
        if self.command == "GET" and server.fault == "changed":
            content = content[:-1] + b"?"
        self.answer(200, headers, content[: len(content) // 2] if short else content)

    def do_GET(self):
        self.do_HEAD()

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for header in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if self.server.fault == "cut" else body)
            self.server.fault = ""

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    """Nothing of this machine is seen: an empty home, and no variable of the Hub."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE", "XDG_", "TRANSFORMERS_", "VITMED_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # whatever it was at the first import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)  # it would ask huggingface.co who the agents are
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.requests, server.fault, server.released = {f"/{TI}/model.safetensors": CONTENT}, [], "", threading.Event()
        server.handle_error = lambda *args: None  # whoever asked may have gone
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield server
        huggingface_hub.close_session()
        server.released.set()
        server.shutdown()


def write(path, content=b"weights"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def cache(folder, name, filename):
    """A file in a Hugging Face cache, as the library lays it out: a blob, a link to it, and what main is."""
    repository = folder / f"models--{name.replace('/', '--')}"
    write(repository / "refs" / "main", COMMIT.encode())
    blob, link = write(repository / "blobs" / "0"), repository / "snapshots" / COMMIT / filename
    link.parent.mkdir(parents=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    return link


def complaint(name, kind=config.InputError):
    with pytest.raises(kind, match=r"\A[^\n]+\Z") as caught:
        hub.find(name)
    return str(caught.value)


def test_a_path_that_exists_wins_over_any_name(tmp_path, monkeypatch):
    monkeypatch.setenv("VITMED_WEIGHTS", str(tmp_path / "weights"))
    write(tmp_path / "weights" / "X.safetensors")
    assert hub.find("org/X") == tmp_path / "weights" / "X.safetensors"
    (tmp_path / "org" / "X").mkdir(parents=True)  # the folder of a run
    assert hub.find("org/X").resolve() == tmp_path / "org" / "X"
    file = write(tmp_path / "home" / "mine.npz")
    assert hub.find("~/mine.npz") == hub.find(str(file)) == file


def test_vitmed_weights_comes_before_the_cache_and_safetensors_before_the_rest(tmp_path, monkeypatch):
    cached = cache(tmp_path / "home/.cache/huggingface/hub", TI, "model.safetensors")
    monkeypatch.setenv("VITMED_WEIGHTS", "~/w")
    assert hub.find(TI) == cached
    for suffix in (".pt", ".bin", ".pth", ".npz", ".safetensors"):  # the name's own dot is no suffix
        file = write(tmp_path / "home" / "w" / f"{STEM}{suffix}")
        assert hub.find(TI) == file


CACHES = {
    "": "home/.cache/huggingface/hub",
    "XDG_CACHE_HOME={}/xdg": "xdg/huggingface/hub",
    "XDG_CACHE_HOME={}/xdg HF_HOME={}/hf": "hf/hub",
    "HF_HOME={}/hf HF_HUB_CACHE=~/c": "home/c",
}


@pytest.mark.parametrize(("variables", "folder"), list(CACHES.items()))
def test_the_cache_is_read_without_the_library(tmp_path, monkeypatch, variables, folder):
    for variable in variables.format(*[tmp_path] * 2).split():
        monkeypatch.setenv(*variable.split("="))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    cached = cache(tmp_path / folder, "facebook/dinov2-small", "pytorch_model.bin")
    assert hub.find("facebook/dinov2-small") == cached
    assert hub.preprocessing("facebook/dinov2-small") == hub.preprocessing(str(cached)) == IMAGENET
    cached.resolve().rename(cached.resolve().with_name("0.1234.incomplete"))  # as a download that was killed leaves it
    assert "HF_HUB_OFFLINE" in complaint("facebook/dinov2-small")


PATHS = "runs/x.safetensors ./a/b /a/b ~/a a/b/c vit_ti a/../b x/y.git https://h/a"


@pytest.mark.parametrize("text", ["", "a/b\n", *PATHS.split()])
def test_what_is_no_name_is_a_path_that_does_not_exist(server, text):
    assert "no such file or folder" in complaint(text)
    assert not server.requests


def test_a_path_within_a_folder_that_is_there_is_no_name(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(config.InputError, match="'runs/missing': no such file or folder in the folder runs"):
        hub.find("runs/missing")
    assert server.requests == []


def test_a_download_is_found_again_without_the_hub(server, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    path = hub.find(TI)
    assert path == tmp_path / f"home/.cache/huggingface/hub/models--{TI.replace('/', '--')}/snapshots/{COMMIT}/model.safetensors"
    assert path.read_bytes() == CONTENT
    assert capsys.readouterr() == ("", f"downloading model.safetensors of {TI} to {tmp_path}/home/.cache/huggingface/hub\n")
    assert not caplog.records, "the library warns of what is not the user's concern"
    server.fault = (503, {})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.find(TI) == path


def test_an_unknown_name_brings_its_own_mean_and_std_and_a_bin_where_there_is_no_better(server):
    server.files = {"/me/x/pytorch_model.bin": CONTENT, "/me/x/config.json": json.dumps({"pretrained_cfg": OURS}).encode()}
    assert hub.find("me/x").name == "pytorch_model.bin"
    server.fault = (503, {})
    assert hub.preprocessing("me/x") == NUMBERS


def test_a_broken_connection_is_mended_and_half_a_file_never_kept(server, tmp_path):
    server.fault = "cut"
    assert hub.find(TI).read_bytes() == CONTENT
    assert [command for command, _ in server.requests].count("GET") == 2
    shutil.rmtree(tmp_path / "home")
    server.fault = "short"
    assert "cannot be downloaded" in complaint(TI)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert hub.find(TI).read_bytes() == CONTENT


def test_what_comes_with_another_checksum_is_removed(server, tmp_path):
    server.fault = "changed"
    assert "what came has SHA-256" in complaint(TI, config.MachineError)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert hub.find(TI).read_bytes() == CONTENT


FAULTS = {
    "shows no such repository (status 401)": (401, {}),
    "shows no such repository (status 404)": (404, {"X-Error-Code": "RepoNotFound"}),
    "accept its terms": (403, {"X-Error-Code": "GatedRepo"}),
    "answers with status 503": (503, {"X-Error-Message": "busy"}),
    "cannot be downloaded (timed out)": "hang",
    "Connection refused": "HF_ENDPOINT=http://127.0.0.1:9",
    "HF_HUB_OFFLINE": "HF_HUB_OFFLINE=1",
    "pip install huggingface_hub": "no library",
}


@pytest.mark.parametrize(("says", "fault"), list(FAULTS.items()))
def test_what_fails_says_which_file_to_put_where(server, tmp_path, monkeypatch, fault, says):
    server.fault = fault
    monkeypatch.setattr(hub, "TIMEOUT", 1.0)
    monkeypatch.setenv("VITMED_WEIGHTS", str(tmp_path / "w"))
    if "=" in fault:
        monkeypatch.setenv(*fault.split("="))
    if fault == "no library":
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    start = time.monotonic()
    text = complaint(TI)
    assert time.monotonic() - start < 5
    assert says in text
    assert f"put model.safetensors of https://huggingface.co/{TI} as {tmp_path}/w/{STEM}.safetensors" in text
    assert "did you mean" not in text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing is written"


def test_a_misspelt_name_is_told_the_right_one(server):
    server.fault = (401, {})
    assert f"did you mean {TI}" in complaint(TI.replace("augreg", "agreg"))
    text = complaint("nobody/nothing")
    assert ("did you mean" in text, "as nothing.safetensors into a folder that VITMED_WEIGHTS names" in text) == (False, True)
    server.fault = (404, {"X-Error-Code": "EntryNotFound"})
    assert "no model.safetensors or pytorch_model.bin" in complaint(TI)
    assert f"did you mean {TI}" in complaint(STEM), "without the organisation it is a path"


def test_a_full_disk_is_the_machines_trouble(server, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 99, 1))
        assert "do not fit" in complaint(TI, config.MachineError)
    assert not (tmp_path / "home").exists()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    assert "full" in complaint(TI, config.MachineError)


KNOWN = {  # by timm 1.0.31, and by the preprocessor_config.json of facebook's
    HALF: f"""{TI} timm/vit_large_patch16_384.augreg_in21k_ft_in1k timm/vit_base_patch32_224.sam_in1k ViT-B_16.npz
        /w/{STEM}.safetensors {AUGREG}.npz w/{AUGREG}--imagenet2012-steps_20k-lr_0.03-res_224.npz""",
    IMAGENET: """timm/vit_small_patch14_dinov2.lvd142m timm/vit_giant_patch14_reg4_dinov2.lvd142m dinov2-small.safetensors
        facebook/vit-mae-large timm/vit_base_patch16_224.mae timm/deit_tiny_distilled_patch16_224.fb_in1k dinov2_vits14_pretrain.pth
        dinov2_vits14_reg4_pretrain.pth mae_pretrain_vit_base.pth deit_tiny_patch16_224-a1311bcf.pth
        facebook/dinov2-with-registers-base""",
    None: """my_breast_model.safetensors dinosaur.pth mae.pth model.safetensors ViT-B-16.pt ViT-B_16.pth my_dinov2_vits14_pretrain.pth
        dinov2_vits14_pretrain.pth.json vit_base_patch16_224_miil.in21k.pth timm/vit_base_patch16_clip_224.openai
        timm/samvit_base_patch16.sa1b me/vit_base_patch16_224.mae vit_base_patch16_224.mae_finetuned.safetensors
        models--me--x/snapshots/1/model.safetensors""",
}


@pytest.mark.parametrize(("name", "stats"), [(name, stats) for stats, names in KNOWN.items() for name in names.split()])
def test_known_names_and_files_and_nothing_else(name, stats):
    assert known.stats(name) == stats
    if stats:
        assert hub.preprocessing(name) == stats, "what is known is not downloaded"


@pytest.mark.parametrize("content", [OURS, {"architecture": "vit", "pretrained_cfg": OURS}, {"do_resize": True, **THEIRS}])
def test_a_sidecar_in_any_of_three_forms(tmp_path, content):
    path = write(tmp_path / "my.model.pth")
    write(tmp_path / "my.json", {"mean": [0], "std": [1]})  # another file's
    write(tmp_path / "my.model.json", content)
    assert hub.preprocessing(str(path)) == NUMBERS
    path = write(tmp_path / "repository" / "model.safetensors")
    write(tmp_path / "repository" / "config.json", {"hidden_size": 3})
    assert hub.preprocessing(str(path)) == ((0.5,), (0.5,))
    write(tmp_path / "repository" / "config.json", content)
    assert hub.preprocessing(str(path)) == NUMBERS


BROKEN = """
    { \xff [0.5] {} {"mean":[0.5]} {"mean":[0.5],"std":[0.5,0.5]} {"mean":[],"std":[]} {"mean":[0.5],"std":[0]} {"mean":[NaN],"std":[0.5]}
    {"mean":[0.5],"std":[Infinity]} {"mean":["0.5"],"std":[0.5]} {"mean":[true],"std":[0.5]} {"mean":[[0.5]],"std":[0.5]}
    {"mean":[123.7],"std":[58.4]} {"pretrained_cfg":{"mean":null,"std":null}}
"""


@pytest.mark.parametrize("content", [*BROKEN.split(), "[" * 100_000], ids=lambda content: content[:30])
def test_a_broken_sidecar_is_an_error(tmp_path, content):
    path = write(tmp_path / "mine.npz")
    write(tmp_path / "mine.json", content.encode("latin-1"))
    with pytest.raises(config.InputError, match=r"^[^\n]*mine\.json[^\n]*$"):
        hub.preprocessing(str(path))


def test_without_any_of_them_half_is_taken_and_said(tmp_path, capsys):
    path = write(tmp_path / "mine.npz")
    write(tmp_path / "config.json", {"mean": [0], "std": [1]})  # not a repository's folder: some other file
    assert hub.preprocessing(str(path)) == ((0.5,), (0.5,))
    line = f"vitmed: {path}: mean and std unknown, 0.5 taken; give model.mean and model.std, or put mine.json beside it\n"
    assert capsys.readouterr().err == line
    (tmp_path / TI).mkdir(parents=True)
    assert hub.preprocessing(TI) == ((0.5,), (0.5,)), "a run's folder may be called anything"
