"""The model card of exported networks: what they are, from what data, how good on the test split and how sure that is, and their limits.

Every value that comes out of a file is escaped. `R` seeds, `N` images.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vitmed import config, metrics
from vitmed.study import collection, comparisons, formats, results, subjects

NON_COMMERCIAL = re.compile(r"\bNC\b|non-?commercial", re.IGNORECASE)
LIMITS = (
    "**Not for clinical use.** It is no medical device, and nobody has examined whether it does any good or harm to patients.",
    "It was trained and tested on splits of one data set. On images of other scanners, hospitals, populations or preparation it may be "
    "much worse; the intervals below say nothing about that. No external validation was made.",
    "It knows its classes alone: of an image of anything else it says one of them all the same.",
    "Probabilities are as the network gives them, not calibrated, and no threshold was chosen for a purpose.",
    "Whether it treats groups of patients alike was not measured.",
)
RECIPE = ("model.variant", "model.pretrained", "model.kernel_size", "model.inflation", "model.depth_positions", "model.position_resize")
RECIPE += ("model.patch_sizes", "model.pooling", "model.drop_path", "model.dtype", "train.epochs", "train.batch_size")
RECIPE += ("train.learning_rate", "train.lr_step_epochs", "train.lr_gamma", "train.weight_decay", "train.beta1", "train.beta2")
RECIPE += ("train.schedule", "train.warmup_epochs", "train.layer_decay", "train.ema_decay", "train.patience", "train.label_smoothing")
RECIPE += ("train.focal_gamma", "train.class_weights", "train.mixup", "train.sampler")
RECIPE += ("augment.crop_scale", "augment.crop_ratio", "augment.rotation_degrees", "augment.flip_h", "augment.flip_w")
RECIPE += ("augment.quarter_turns", "augment.brightness", "augment.contrast")


@dataclasses.dataclass(frozen=True)
class About:
    """What a run's own files do not say: of its data, and of the files that the card lies beside.

    `stored` is *S, C of an image as the set stores it; `files` name -> seed; `agreement` seed -> how well the file was found to agree.
    """

    source: str
    licence: str
    synthetic: bool
    class_names: Sequence[str]
    num_examples: Mapping[str, int]
    stored: Sequence[int]
    config: Mapping[str, Any]
    kind: str
    files: Mapping[str, int]
    agreement: Mapping[int, str]
    loading: str
    version: str


def escaped(value: Any) -> str:
    """A value as Markdown that shows it as it is, in one line."""
    return re.sub(r"[\[\]#~]", r"\\\g<0>", formats.markdown_text(config.one_line(value)))


def render(run: collection.Run, about: About) -> str:
    """The card as Markdown."""
    parts = [
        f"# {escaped(run.dataset)}: ViT with patches of {run.patch}",
        _warnings(run, about),
        _table(("", ""), _what(run, about)),
        "## Files\n\n" + _table(("file", "seed", "best epoch", "compared before it was written"), _files(run, about)),
        f"## Loading it\n\n{about.kind}\n\n```python\n{about.loading}```",
        "## Preprocessing\n\n" + _preprocessing(run, about),
        "## Data\n\n" + _table(("", ""), _data(run, about)),
        "## Recipe\n\n" + _table(("setting", "value"), [(f"`{name}`", escaped(_setting(about.config[name]))) for name in RECIPE]),
        "## Results on the test split\n\n" + _results(run),
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in (*_synthetic_limit(about), *LIMITS)),
        f"Written by vitmed {escaped(about.version)}; trained on {escaped(run.result['device'])} with JAX "
        f"{escaped(run.result['versions'].get('jax', '?'))}; settings `{run.result['config_digest']}`.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _warnings(run: collection.Run, about: About) -> str:
    """What nobody may overlook."""
    said = ["**Not for clinical use.** For research on methods only; see the limits below."]
    if NON_COMMERCIAL.search(about.licence):
        said.append(f"**Non-commercial.** The data it was trained on are licensed under {escaped(about.licence)}: no commercial use.")
    if about.synthetic:
        said.append("**Synthetic data.** It was trained on generated images and says nothing about medical ones.")
    return "\n>\n".join(f"> {sentence}" for sentence in said)


def _what(run: collection.Run, about: About) -> list[tuple[str, str]]:
    result = run.result
    return [
        ("task", f"{escaped(result['task'])} classification of {run.rank}D images"),
        ("classes, in the order of the outputs", ", ".join(f"{index}: {escaped(name)}" for index, name in enumerate(about.class_names))),
        ("network", f"Vision Transformer, {escaped(result['variant'])}, {result['num_params']:,} parameters"),
        ("started from", f"{escaped(_setting(result['pretrained']))} (with a licence of its own)" if result["pretrained"] else "scratch"),
        ("image size", _by(result["image_size"])),
        ("patch size", f"{_by(result['patch_size'])} ({result['num_tokens']:,} tokens)"),
        ("10⁹ multiply-accumulates per image", f"{result['gmacs_forward']:.3g}"),
        ("seeds here", f"{', '.join(map(str, run.seeds))} (the run has {len(result['seeds'])}; failed: {len(result['failed_seeds'])})"),
    ]


def _files(run: collection.Run, about: About) -> list[tuple[str, ...]]:
    epochs = dict(zip(run.result["seeds"], run.result["best_epoch"], strict=True))
    return [(f"`{name}`", str(seed), str(epochs[seed]), about.agreement[seed]) for name, seed in about.files.items()]


def _preprocessing(run: collection.Run, about: About) -> str:
    stored, size = tuple(about.stored), tuple(run.result["image_size"])
    normalisation = run.result["normalisation"]
    steps = ["x is inverted to (256 - x) mod 256"] if about.config["data.invert"] else []
    steps += ["divided by 255"]
    steps += [f"resized to {_by(size)} (bicubic, antialiased, cut to [0, 1])"] if stored[:-1] != size else []
    if (channels := about.config["model.in_channels"]) != stored[-1]:
        steps.append(f"copied to {channels} channels")
    steps.append(f"less the mean {_setting(normalisation['mean'])}, divided by the standard deviation {_setting(normalisation['std'])}")
    return f"Images are uint8 `[b, {', '.join(map(str, stored))}]` as the set stores them. Each value is {', '.join(steps)}."


def _data(run: collection.Run, about: About) -> list[tuple[str, str]]:
    rows = [("data set", f"{escaped(run.dataset)}{' (synthetic)' if about.synthetic else ''}"), ("source", escaped(about.source))]
    rows.append(("licence", escaped(about.licence) or "not stated: ask those who gave you the data"))
    rows.append(("images", ", ".join(f"{count:,} {split}" for split, count in about.num_examples.items())))
    return rows + ([("MD5 of the file", f"`{run.result['data_md5']}`")] if run.result["data_md5"] else [])


def _results(run: collection.Run) -> str:
    """The test metrics of each seed, and of their mean, with 95 % intervals."""
    whole, resampler = subjects.of_runs([run])[0], comparisons.Resampler()
    names = metrics.metric_names(run.task)
    rows = []
    for index, seed in enumerate(whole.seeds):
        one = dataclasses.replace(whole, seeds=(seed,), probabilities=whole.probabilities[index : index + 1])
        rows.append((f"seed {seed}", *_intervals(resampler, one, names)))
    if len(whole.seeds) > 1:
        rows.append((f"mean of {len(whole.seeds)} seeds", *_intervals(resampler, whole, names)))
    mean_too = "; that of the mean, over seeds and images together" if len(whole.seeds) > 1 else ""
    of_several = ", on the mean over the patch sizes of one network" if run.config["model.patch_sizes"] else ""
    method = (
        f"{len(whole.labels):,} test images. In brackets the 95 % interval of 2,000 resamples: of one seed, over the images{mean_too}. "
        f"The parameters are those of the epoch of the lowest validation loss{of_several}; the test split chose nothing."
    )
    return f"{method}\n\n" + _table(("", *(results.NAMES[name] for name in names)), rows)


def _intervals(resampler: comparisons.Resampler, subject: subjects.Subject, names: Sequence[str]) -> list[str]:
    found = resampler.intervals(subject)
    return ["undefined" if found[name] is None else escaped(results.interval_text(found[name])) for name in names]


def _synthetic_limit(about: About) -> tuple[str, ...]:
    return ("The images are synthetic: it shows how the program works, and recognises nothing that occurs in medicine.",) * about.synthetic


def _by(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes))


def _setting(value: Any) -> str:
    """A setting as people write it; of a path its last name alone, which is nobody else's business."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text.rstrip("/").rpartition("/")[2] if text.startswith(("/", "~", ".")) else text or "-"
