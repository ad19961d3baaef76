"""Give a finished run's network away: `python -m vitmed.export --workdir=DIR --format=stablehlo|safetensors --out=DIR`."""

import dataclasses
import functools
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from vitmed import __version__, building, cli, inference, network, planning, record
from vitmed import config as config_lib
from vitmed.data import medmnist, sources
from vitmed.models import adapters, build, inputs, pretrained, snippets, stablehlo, weights
from vitmed.runs import files, folder, guard, machine
from vitmed.study import card, collection
from vitmed.training import tasks

FORMATS = ("stablehlo", "safetensors")
EXAMPLES = """examples:
  python -m vitmed.export --workdir=runs/breast_p7 --format=stablehlo --out=exported/breast_p7
  python -m vitmed.export --workdir=runs/breast_p7 --format=safetensors --out=weights/breast_p7 --seed=0
  python -m vitmed.export --workdir=runs/breast_p7 --format=stablehlo --out=exported/breast_p7 --data_root=/data/medmnist

DIR gets a file for each seed and README.md, a model card that says how to load them. stablehlo: a program from uint8 images to
probabilities for CPUs, NVIDIA GPUs and TPUs, which needs jax, numpy and flatbuffers alone. safetensors: the weights under timm's names.
Each file is compared with the run's own test predictions before anything is written.

exit status: 0 done; 1 done, but failed seeds were left out, or trouble of the machine; 2 wrong input"""

# Largest difference of a probability from the run's own: where both were computed in float32 on a CPU, and elsewhere, where products are
# rounded to ten bits (TF32) or eight (bfloat16).
TOLERANCE, LOOSE_TOLERANCE = 1e-4, 2e-2
# Test images that are compared: as many as take this many GMACs, within these bounds.
COMPARED_GMACS, COMPARED = 500.0, (2, 64)


def make_parser() -> cli.Parser:
    """The flags."""
    parser = cli.Parser(prog="vitmed.export", description="Write a finished run's network as files for other programs.", epilog=EXAMPLES)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the folder of a finished run")
    parser.add_argument("--format", required=True, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make; one that exists must be empty")
    parser.add_argument("--seed", metavar="S", help="of this seed alone (default: of every one that has not failed)")
    parser.add_argument("--base", metavar="FILE", help="the weights that a plugin stands on, where they do not lie where it was trained")
    parser.add_argument("--data_root", metavar="DIR", help="folder of .npz files, where it is not the one that the run used")
    return parser


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A finished run, checked, and the first images uint8 [n, *S, C] of its test split, as the set stores them.

    A plugin is `restored` with its base; of other runs each seed's file of weights is what is given away.
    """

    run: collection.Run
    planned: planning.Experiment
    images: np.ndarray
    dataset: sources.Dataset
    restored: inference.Restored | None = None

    @property
    def stored(self) -> tuple[int, ...]:
        """*S, C."""
        return self.images.shape[1:]

    @property
    def tolerance(self) -> float:
        """How far a probability may lie from the run's."""
        exact = self.planned.config.model.dtype == "float32" and self.run.result["device"].startswith("cpu")
        return TOLERANCE if exact and jax.default_backend() == "cpu" else LOOSE_TOLERANCE

    @property
    def form(self) -> snippets.Form:
        """What loading takes."""
        planned = self.planned
        return snippets.Form(
            architecture=planned.network.architecture,
            stored=self.stored,
            **dataclasses.asdict(planned.geometry),
            in_channels=planned.config.model.in_channels,
            num_classes=planned.description.num_classes,
            mean=planned.network.mean,
            std=planned.network.std,
            multi_label=planned.description.task == "multi-label",
            inverted=planned.config.data.invert,
        )


def main(argv: Sequence[str]) -> int:
    """Export and print where to; the exit status."""
    flags, overrides = cli.parse_flags(make_parser(), argv)
    if overrides:
        raise config_lib.InputError(f"--config.{next(iter(overrides))}: a run's config is its own; vitmed.export takes no overrides")
    config_lib.one_of("--format", flags.format, FORMATS)
    for name, given in (("--workdir", flags.workdir), ("--out", flags.out)):
        config_lib.require(bool(given), name, given, "a folder")
    out, path = (pathlib.Path(name).expanduser() for name in (flags.out, flags.workdir))
    files.check_new_folder(out, f"--out={flags.out}")
    run = chosen(collection.read(path), flags.seed)
    config = inference.restored_config(folder.RunFolder(path), flags.data_root, flags.base)
    machine.cache_programs()
    with machine.memory_errors():
        source = read(run, config, flags.format)
        contents, agreement = zip(*(export(source, index, flags.format) for index in range(len(run.seeds))), strict=True)
    names = {f"seed{seed}.{flags.format}": seed for seed in run.seeds}
    text = make_card(source, flags.format, names=names, agreement=dict(zip(run.seeds, agreement, strict=True)))
    with guard.Signals():  # for the moment that it takes, so that a signal leaves no half of it
        files.write_folder(out, dict(zip(names, contents, strict=True)) | {"README.md": text.encode()})
    for name, said in zip(names, agreement, strict=True):
        print(f"{out / name}: {said}")
    print(out / "README.md")
    left_out = run.result["failed_seeds"] if flags.seed is None else ()
    if left_out:
        print(f"vitmed: {path}: failed seeds {', '.join(map(str, left_out))} are left out", file=sys.stderr)
    return 1 if left_out else 0


def chosen(run: collection.Run, seed: str | None) -> collection.Run:
    """The run with one of its seeds alone, or as it is; InputError where it has no such seed, or that has failed."""
    if seed is None:
        return run
    number, listed = config_lib.parse("--seed", seed, 0), ", ".join(map(str, run.seeds))
    if number not in run.seeds:
        why = "has failed" if number in run.result["failed_seeds"] else "is none of the run's"
        raise config_lib.InputError(f"--seed={seed}: {why}; choose one of {listed}")
    place = run.seeds.index(number)
    return dataclasses.replace(run, seeds=(number,), probabilities=run.probabilities[place : place + 1])


def read(run: collection.Run, config: ml_collections.ConfigDict, kind: str) -> Source:
    """The run's network and test images; InputError where weights or data are not there, are others', or do not go into the format."""
    run_folder = folder.RunFolder(run.path)
    planned = planning.plan(config, network.of_record(run_folder.read_model(), str(run_folder.model)))
    for seed in run.seeds if planned.gives_weights else ():
        if not run_folder.weights(seed).is_file():
            raise config_lib.InputError(f"{run_folder.weights(seed)} is missing; restore it from a copy")
    if kind == "safetensors" and planned.views:
        raise config_lib.InputError(f"--format={kind}: {run.path} sees slices, and no ViT alone is what it does with them; take stablehlo")
    if kind == "safetensors" and planned.tuning.adapter_width:
        raise config_lib.InputError(
            f"--format={kind}: {run.path} has adapters, which no other program's ViT has a place for; take stablehlo"
        )
    if kind == "stablehlo":
        stablehlo.require_size(run.result["num_params"])
    dataset = planned.load(as_stored=True)  # a set that training inverts is inverted within the exported program
    test = dataset.splits["test"]
    if dataset.md5 != run.result["data_md5"] or not np.array_equal(test.labels, run.labels):
        theirs = f"MD5 {run.result['data_md5']}, these have {dataset.md5}"
        raise config_lib.InputError(f"{run.path}: trained on other data ({theirs}); give the folder of the right ones as --data_root")
    least, most = COMPARED
    count = max(least, min(most, int(COMPARED_GMACS / planned.gmacs_forward)))
    restored = None if planned.gives_weights else inference.restore(run.path, planned, steps_per_epoch=1)
    return Source(run, planned, test.images[:count], dataset, restored)


def export(source: Source, index: int, kind: str) -> tuple[bytes, str]:
    """(the file of one seed, how well it agrees in words): made, read back and compared with the run's predictions. InputError."""
    run, description = source.run, source.dataset.description
    path = folder.RunFolder(run.path).weights(run.seeds[index])
    if source.restored is not None:
        path = folder.RunFolder(run.path).checkpoints
        data, function = of_plugin(source, index, kind)
    else:
        data = files.read(path)
        function = of_file(source, path)
    if kind == "stablehlo":
        data = stablehlo.pack(function, image_size=description.image_size, num_channels=description.num_channels)
        function = stablehlo.unpack(data)
    found, expected = np.asarray(function(source.images)), run.probabilities[index][: len(source.images)]
    difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf
    if not difference <= source.tolerance:  # nor NaN
        raise config_lib.InputError(
            f"{path}: gives other probabilities than predictions/test.npz (they differ by up to {difference:.3g}, allowed is "
            f"{source.tolerance:g}); restore both from one copy of the run"
        )
    words = f"differs from the run's predictions by at most {difference:.2g} on {len(found)} test images (allowed: {source.tolerance:g})"
    return data, words


def of_plugin(source: Source, index: int, kind: str) -> tuple[bytes, Callable[[Any], jax.Array]]:
    """(the file of weights, images uint8 -> probabilities) of one seed of a plugin, joined with its base; the file only where asked for."""
    restored, seed = source.restored, source.run.seeds[index]
    place = restored.planned.seeds.index(seed)
    trained = jax.tree.map(lambda leaf: leaf[place], restored.params)
    params = adapters.join(restored.recipe.base, trained)
    params = params if source.planned.views else source.planned.computed_with(params)
    if kind != "safetensors":
        return b"", network_of(source, params)
    data = record.packed(source.planned, params, seed=seed, val_loss=source.run.result["val"]["loss"][place])
    with tempfile.TemporaryDirectory() as there:
        path = pathlib.Path(there) / "weights.safetensors"
        files.write_whole(path, data)
        return data, of_file(source, path)


def of_file(source: Source, path: pathlib.Path) -> Callable[[Any], jax.Array]:
    """`network_of` the weights of a file; InputError where it is not of the run."""
    config, net = source.planned.config, source.planned.network
    described = weights.describe(str(path), expected=net.architecture)
    if described.num_classes != source.planned.description.num_classes or described.in_channels != config.model.in_channels:
        raise config_lib.InputError(f"{path}: is not of this run, by its classes or channels; restore it from a copy")
    geometry = dataclasses.asdict(source.planned.geometry)
    loaded = dataclasses.replace(described, architecture=net.architecture)
    params, _ = pretrained.load(loaded, **geometry, num_classes=None, in_channels=config.model.in_channels)
    return network_of(source, params)


def network_of(source: Source, params: Any) -> Callable[[Any], jax.Array]:
    """Images uint8 [b, *S, C] -> probabilities [b, K]."""
    planned = source.planned
    config, net = planned.config, planned.network
    module = build.model(
        net.architecture,
        patch_size=planned.encoded.patch_size,
        kernel_size=planned.encoded.kernel_size,
        num_classes=None if planned.views else planned.description.num_classes,
        adapter_width=planned.tuning.adapter_width,
        adapter_scale=planned.tuning.adapter_scale,
        dtype=config.model.dtype,
        attention=stablehlo.attend(planned.num_tokens),
    )
    preprocess = {"in_channels": config.model.in_channels, "mean": net.mean, "std": net.std, "image_size": planned.image_size}
    return stablehlo.program(
        building.slices_model(planned, module) if planned.views else module,
        params,
        prepare=functools.partial(inputs.prepare, **preprocess),
        probabilities=tasks.TASKS[planned.description.task].probabilities,
        inverted=config.data.invert,
    )


def make_card(source: Source, kind: str, *, names: dict[str, int], agreement: dict[int, str]) -> str:
    """The model card beside the files."""
    description, form, first = source.dataset.description, source.form, next(iter(names))
    about = card.About(
        source=data_source(description),
        licence=description.licence,
        synthetic=description.synthetic,
        class_names=description.class_names,
        num_examples=description.num_examples,
        stored=source.stored,
        config=config_lib.flatten(source.planned.config.to_dict()),
        kind=loading(form, kind),
        files=names,
        agreement=agreement,
        loading=snippets.stablehlo(form, first) if kind == "stablehlo" else snippets.weights(form, first),
        version=__version__,
    )
    return card.render(source.run, about)


def data_source(description: sources.Description) -> str:
    """Where a set comes from, in words."""
    if description.synthetic:
        return "generated by vitmed: specks against a smooth blob of the same mean and size"
    if description.name in medmnist.entries():
        where = "https://medmnist.com, https://doi.org/10.1038/s41597-022-01721-8"
        return f"MedMNIST v2, {description.name}: {where}; cite it, and the source of the set"
    return "data of their own of those who trained it"


def loading(form: snippets.Form, kind: str) -> str:
    """What a person has to know before loading a file, in a sentence or two."""
    if kind == "stablehlo":
        return (
            "With jax and numpy alone (and flatbuffers, by which jax reads it: `pip install jax flatbuffers`), on a CPU, an NVIDIA GPU or "
            "a TPU, for any number of images at a time; preprocessing and weights are within. JAX reads such a file for at least six "
            f"months after its version ({jax.__version__}) came out."
        )
    return "With timm and torch." if form.timm_has_it else "With vitmed: timm has no model of this form."


if __name__ == "__main__":
    sys.exit(cli.run_cli(main, sys.argv[1:]))
