"""Weights by path or by name: where their file lies, downloaded if need be, and the mean and std that they were trained with.

A name is `ORG/X` of the Hugging Face Hub. It is looked for as $VITMED_WEIGHTS/X.safetensors (or .npz, .pth, .bin, .pt), then in the
Hugging Face cache, and then downloaded into that cache by the optional package huggingface_hub; only the last step needs it.
"""

import contextlib
import difflib
import errno
import hashlib
import os
import pathlib
import re
import shutil
import sys
import warnings
from collections.abc import Iterator

from vitmed import config
from vitmed.models import known

TIMEOUT = 10.0  # seconds for the Hub's first answer, which is asked for once: the library alone would try for six minutes
MAKE_ROOM = "make room, or name another folder with HF_HUB_CACHE"


def find(path_or_name: str) -> pathlib.Path:
    """The file of a path or a name, or the folder of a path, as it is; downloads what lies nowhere. InputError, MachineError."""
    path = os.path.expanduser(path_or_name)
    if path_or_name and os.path.exists(path):
        return pathlib.Path(path)
    if not is_name(path_or_name):
        mend = "give an existing path, or a name such as timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
        raise config.InputError(f"{path_or_name!r}: no such file or folder{_meant(path_or_name)}; {mend}")
    if found := _placed(path_or_name) or _cached(path_or_name):
        return found
    owner = path_or_name.partition("/")[0]
    if os.path.isdir(owner) and owner not in {name.partition("/")[0] for name in known.NAMES}:
        raise config.InputError(f"{path_or_name!r}: no such file or folder in the folder {owner}; give an existing path")
    return _download(path_or_name)


def is_name(text: str) -> bool:
    """Whether this may be ORG/X of the Hub rather than a path."""
    word = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
    plausible = re.fullmatch(f"{word}/{word}", text, re.ASCII) and "--" not in text and ".." not in text
    return bool(plausible) and not text.endswith((*known.SUFFIXES, ".git"))


def weights_folder() -> pathlib.Path | None:
    """$VITMED_WEIGHTS, where it is set."""
    folder = os.environ.get("VITMED_WEIGHTS")
    return pathlib.Path(os.path.expanduser(folder)) if folder else None


def cache_folder() -> pathlib.Path:
    """The Hugging Face cache, by the same variables and in the same order as the library has them."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(home, "huggingface")
    folder = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return pathlib.Path(os.path.expandvars(os.path.expanduser(folder)))


def _placed(name: str) -> pathlib.Path | None:
    """The file that the user has put into $VITMED_WEIGHTS."""
    folder, stem = weights_folder(), name.partition("/")[2]
    files = [folder / f"{stem}{suffix}" for suffix in known.SUFFIXES] if folder else []
    return next((file for file in files if os.path.isfile(file)), None)


def _cached(name: str) -> pathlib.Path | None:
    """The file in the Hugging Face cache, whose layout is read here so that it serves without the library."""
    folder = cache_folder() / f"models--{name.replace('/', '--')}"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
        return next((snapshot / filename for filename in known.WEIGHTS if os.path.isfile(snapshot / filename)), None)
    return None


def _download(name: str) -> pathlib.Path:
    """Download a name's weights into the Hugging Face cache; InputError, MachineError where the disk is full.

    The library writes to a file of its own, compares the size and renames it when all is there, so nothing half is ever found under
    its final name. It continues after a broken connection (2.4 does, 1.0 gives up), but starts over in the next process.
    """
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise config.InputError(_not_found(name, f"not here, and {variable} forbids to download it", "unset that"))
    try:
        return _fetch(name)
    except (config.InputError, config.MachineError):
        raise
    except Exception as error:  # many kinds, from three libraries; each of them means that the file did not come
        raise _failure(name, error) from error


def _fetch(name: str) -> pathlib.Path:
    """Download by the library; whatever it raises."""
    import huggingface_hub.errors  # optional, and nothing else needs it

    cache, endpoint = cache_folder(), os.environ.get("HF_ENDPOINT") or None

    def described(filename: str) -> tuple[int, str | None] | None:
        """Bytes (0 where they are not said) and ETag of a file of the repository; None where there is no such file."""
        url = huggingface_hub.hf_hub_url(name, filename, endpoint=endpoint)
        try:
            metadata = huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT, endpoint=endpoint)
            return metadata.size or 0, metadata.etag
        except huggingface_hub.errors.EntryNotFoundError:
            return None

    with _quietly():
        there = ((filename, described(filename)) for filename in known.WEIGHTS)
        weights, found = next(((filename, found) for filename, found in there if found is not None), (None, None))
        if weights is None:
            mend = "choose another name, or give the path of a file"
            raise config.InputError(f"{name}: its repository has no {' or '.join(known.WEIGHTS)}; {mend}")
        total, etag = found
        _require_space(name, total, cache)
        if not sys.stderr.isatty():  # else the library shows a progress bar
            print(f"downloading {weights} of {name} to {cache}", file=sys.stderr)
        # What says mean and std comes first: once the weights are in the cache, nothing is downloaded any more.
        wanted = [] if name in known.NAMES else [filename for filename in known.CONFIGS if described(filename) is not None]
        options = {"cache_dir": str(cache), "endpoint": endpoint, "etag_timeout": TIMEOUT}
        path = [pathlib.Path(huggingface_hub.hf_hub_download(name, filename, **options)) for filename in (*wanted, weights)][-1]
        _verify(name, path, etag)
        return path


def _verify(name: str, path: pathlib.Path, etag: str | None) -> None:
    """MachineError, and the file removed, where it is not what the Hub has: of large files the ETag is the SHA-256, which nobody checks."""
    if etag is None or not re.fullmatch("[0-9a-f]{64}", etag):
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != etag:
        for there in {path.resolve(), path}:
            there.unlink()
        raise config.MachineError(f"{name}: what came has SHA-256 {found}, the Hub's file {etag}; it was removed, try again")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the library's advice to log in, and its warnings, off the screen; errors are ours to tell."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _require_space(name: str, size: int, folder: pathlib.Path) -> None:
    """MachineError where the disk of a folder that may not exist yet cannot take `size` bytes."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if size > (free := shutil.disk_usage(there).free):
        raise config.MachineError(f"{name}: {size / 1e6:.0f} MB do not fit into {folder}, where {free / 1e6:.0f} MB are free; {MAKE_ROOM}")


def _failure(name: str, error: Exception) -> Exception:
    """The one-line error for what the library has raised."""
    cause = " ".join(str(error).split()) or type(error).__name__
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in cause:
        return config.MachineError(f"{name}: the disk of {cache_folder()} is full; {MAKE_ROOM}")
    if isinstance(error, ModuleNotFoundError) and error.name == "huggingface_hub":
        why, mend = "not here, and huggingface_hub, which downloads it, is not installed", "pip install huggingface_hub"
    elif (response := getattr(error, "response", None)) is None:
        why, mend = f"not here, and it cannot be downloaded ({cause})", "mend that and try again"
    elif response.headers.get("X-Error-Code") == "GatedRepo":
        why, mend = f"its owner lets in only those who ask (status {response.status_code})", "accept its terms and run hf auth login"
    elif response.status_code in (401, 403, 404):
        why, mend = (
            f"the Hub shows no such repository (status {response.status_code})",
            "mend the name, or run hf auth login if it is private",
        )
    else:
        why, mend = f"the Hub answers with status {response.status_code}", "try again later"
    return config.InputError(_not_found(name, why, mend))


def _not_found(name: str, why: str, mend: str) -> str:
    """An error's words: what came, why it was not downloaded, which file to put where, and where it was looked for."""
    folder, filename = weights_folder(), f"{name.partition('/')[2]}.safetensors"
    place = f"as {folder / filename}" if folder else f"as {filename} into a folder that VITMED_WEIGHTS names"
    looked = f"looked for it as a path, in {folder or '$VITMED_WEIGHTS, which is not set,'} and in {cache_folder()}"
    return f"{name}: {why}{_meant(name)}; {mend}, or put {known.WEIGHTS[0]} of https://huggingface.co/{name} {place} ({looked})"


def _meant(name: str) -> str:
    """' (did you mean ...?)' where a known name is much like this one, else nothing."""
    close = [] if name in known.NAMES else difflib.get_close_matches(name, known.NAMES, n=2, cutoff=0.8)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def preprocessing(path_or_name: str) -> known.Stats:
    """Mean and std of the values in [0, 1] that the weights expect: known, from a sidecar, or one 0.5 and a line on stderr."""
    folder = os.path.isdir(os.path.expanduser(path_or_name))  # of a run, which may be called anything
    if not folder and (stats := known.stats(path_or_name)):
        return stats
    path = find(path_or_name)
    if not folder and (stats := known.stats(str(path)) or known.sidecar(path)):
        return stats
    mend = f"give model.mean and model.std, or put {known.stem(path.name)}.json beside it"
    print(f"vitmed: {path_or_name}: mean and std unknown, 0.5 taken; {mend}", file=sys.stderr)
    return (0.5,), (0.5,)
