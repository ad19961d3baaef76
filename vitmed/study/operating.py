"""From probabilities to decisions: temperature scaling and operating points, fitted on validation and nowhere else.

One temperature per seed (Guo et al. 2017, arXiv 1706.04599) and one for the ensemble, the mean of the seeds' calibrated probabilities,
which averaging has made less sure of itself again (Rahaman and Thiery 2021, arXiv 2007.08792). Thresholds apply to calibrated
probabilities. `R` seeds, `N` images, `L` labels, `K` classes, `C` classes that have thresholds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, special

from vitmed import config as config_lib
from vitmed import metrics
from vitmed.runs import folder

SPECIFICITY = 0.95
RULES = ("specificity_95", "youden")  # the lowest threshold of that specificity; the highest sensitivity + specificity
HOTTEST = 20.0  # temperatures are looked for from 1 / HOTTEST to HOTTEST
UNDECIDED = -1  # where validation gave no threshold
# Softmax in float32 tells small probabilities from 0 down to here, and a sigmoid's from 1 no nearer than 2^-24.
TINY, NEAR_ONE = float(np.finfo(np.float32).tiny), 2.0**-24


class Calibrated(NamedTuple):
    """Calibrated probabilities float64: of each seed [R, N, K], NaN for those that failed, and of their ensemble [N, K]."""

    of_seeds: np.ndarray
    ensemble: np.ndarray


def scored(task: str, num_classes: int) -> list[int]:
    """The classes that have thresholds: class 1 of binary tasks, every class against the rest or every label of the others."""
    metrics.metric_names(task)
    return [1] if task == "binary" else list(range(num_classes))


def fit(task: str, labels: np.ndarray, probabilities: np.ndarray, *, seeds: Sequence[int]) -> dict[str, Any]:
    """What calibration.json says: labels int [N, L] and probabilities [R, N, K] of the validation split, whose seeds these are.

    Of every seed and of the ensemble the `temperature` and `classes`: by rule a threshold with the sensitivity and specificity that it
    reaches on validation. Null is a seed whose probabilities are not finite, an ensemble of none, and a rule for a class that validation
    has on all or none of its images. ValueError for arrays that do not fit the task.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    for of_seed in probabilities:
        metrics.checked(task, labels, of_seed)
    of_seeds = [_fit(task, labels, of_seed) if np.isfinite(of_seed).all() else None for of_seed in probabilities]
    alive = [temper(task, of_seed, fitted["temperature"]) for of_seed, fitted in zip(probabilities, of_seeds, strict=True) if fitted]
    return {
        "schema_version": folder.CALIBRATION_VERSION,
        "task": task,
        "num_classes": probabilities.shape[2],
        "seeds": [int(seed) for seed in seeds],
        "of_seeds": of_seeds,
        "ensemble": _fit(task, labels, np.mean(alive, axis=0)) if alive else None,
    }


def _fit(task: str, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    temperature = best_temperature(task, labels, probabilities)
    calibrated = temper(task, probabilities, temperature)
    truth = metrics.of_class(task, labels, probabilities.shape[1])
    classes = [{"class": k, **operating_points(truth[:, k], calibrated[:, k])} for k in scored(task, probabilities.shape[1])]
    return {"temperature": temperature, "classes": classes}


def temper(task: str, probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log p / T) over the classes, of multi-label tasks sigmoid(logit p / T): probabilities [..., K] -> float64 [..., K]."""
    logits = _logits(task, probabilities) / temperature
    return special.expit(logits) if task == "multi-label" else special.softmax(logits, axis=-1)


def _logits(task: str, probabilities: np.ndarray) -> np.ndarray:
    probabilities = np.asarray(probabilities, np.float64)
    if task == "multi-label":
        return special.logit(np.clip(probabilities, NEAR_ONE, 1 - NEAR_ONE))
    return np.log(np.maximum(probabilities, TINY))


def best_temperature(task: str, labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The temperature of the least cross-entropy of labels [N, L] under probabilities [N, K], to six digits.

    It is 1 where every image is right: any lower temperature would then fit better still, so that validation cannot tell how sure to be.
    """
    logits, truth = _logits(task, probabilities), metrics.of_class(task, labels, probabilities.shape[1])
    margins = np.where(truth, logits, -logits) if task == "multi-label" else _margins(logits, truth)
    if not len(labels) or (margins > 0).all():
        return 1.0
    # Convex in 1 / T, hence with one minimum in log T.
    end = math.log(HOTTEST)
    found = optimize.minimize_scalar(_cross_entropy(task, logits, truth), bounds=(-end, end), method="bounded", options={"xatol": 1e-8})
    return float(f"{math.exp(found.x):.6g}")


def _margins(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """By how much the logit of the true class is above the highest other [N]."""
    return logits[truth] - np.where(truth, -np.inf, logits).max(axis=1)


def _cross_entropy(task: str, logits: np.ndarray, truth: np.ndarray) -> Callable[[float], float]:
    """Mean cross-entropy in nats as a function of log T."""
    if task == "multi-label":
        signed = np.where(truth, logits, -logits)
        return lambda log_t: float(np.logaddexp(0.0, -signed / math.exp(log_t)).mean())
    return lambda log_t: -float(special.log_softmax(logits / math.exp(log_t), axis=1)[truth].mean())


def operating_points(positive: np.ndarray, scores: np.ndarray) -> dict[str, dict[str, float] | None]:
    """A threshold for each of RULES with its sensitivity and specificity, from bool [N] and scores [N]; None where a side is absent.

    An image is positive from the threshold on. Thresholds lie halfway between neighbouring scores, so that an ulp decides nothing. At
    equal sensitivity + specificity (Youden 1950) the lower threshold is taken: it finds more.
    """
    num_positives, num_negatives = int(positive.sum()), int((~positive).sum())
    if not num_positives or not num_negatives:
        return dict.fromkeys(RULES)
    levels = np.unique(scores)
    halfway = (levels[:-1] + levels[1:]) / 2
    between = np.where(halfway > levels[:-1], halfway, levels[1:])  # of neighbouring floats the half is the lower one
    above = (levels[-1] + 1) / 2 if levels[-1] < 1 else math.nextafter(1.0, 2.0)
    thresholds = np.array([0.0, *between, max(above, math.nextafter(levels[-1], 2.0))])
    # At threshold i the scores below it are the lowest i levels.
    found = num_positives - np.searchsorted(np.sort(scores[positive]), thresholds)
    spared = np.searchsorted(np.sort(scores[~positive]), thresholds)
    sensitivity, specificity = found / num_positives, spared / num_negatives
    chosen = {
        "specificity_95": int(np.argmax(specificity >= SPECIFICITY)),
        # In whole numbers, in which ties are ties.
        "youden": int(np.argmax(found * num_negatives + spared * num_positives)),
    }
    return {
        rule: {"threshold": float(thresholds[i]), "sensitivity": float(sensitivity[i]), "specificity": float(specificity[i])}
        for rule, i in chosen.items()
    }


def apply(record: Mapping[str, Any], probabilities: np.ndarray) -> Calibrated:
    """Calibrate probabilities [R, N, K] of the record's seeds, in its order, and average; InputError where they are of another run."""
    probabilities = np.asarray(probabilities)
    expected = (len(record["seeds"]), record["num_classes"])
    if probabilities.ndim != 3 or (len(probabilities), probabilities.shape[2]) != expected:
        shape = "x".join(map(str, probabilities.shape))
        raise config_lib.InputError(f"the calibration is of {expected[0]} seeds and {expected[1]} classes, the probabilities are {shape}")
    of_seeds = np.full(probabilities.shape, np.nan)
    for index, fitted in enumerate(record["of_seeds"]):
        if fitted is not None:
            of_seeds[index] = temper(record["task"], probabilities[index], fitted["temperature"])
    if record["ensemble"] is None:
        return Calibrated(of_seeds, np.full(probabilities.shape[1:], np.nan))
    alive = [index for index, fitted in enumerate(record["of_seeds"]) if fitted is not None]
    mean = of_seeds[alive].mean(axis=0)
    return Calibrated(of_seeds, temper(record["task"], mean, record["ensemble"]["temperature"]))


def decide(record: Mapping[str, Any], calibrated: np.ndarray, *, rule: str, seed: int | None = None) -> np.ndarray:
    """1 where calibrated probabilities [N, K] of a seed, or of the ensemble, reach the class's threshold, else 0: int8 [N, C].

    The columns are `scored`'s classes: of binary tasks the one column is the label; of multi-class ones an image may reach no class's
    threshold or several. UNDECIDED where validation gave none. InputError for an unknown rule or seed, or one that failed.
    """
    config_lib.one_of("the operating point", rule, RULES)
    if seed is not None and seed not in record["seeds"]:
        raise config_lib.InputError(f"seed {seed} is not of this run; it has {', '.join(map(str, record['seeds']))}")
    fitted = record["ensemble"] if seed is None else record["of_seeds"][record["seeds"].index(seed)]
    if fitted is None:
        raise config_lib.InputError(f"{'every seed' if seed is None else f'seed {seed}'} of this run failed; there is nothing to decide by")
    columns = [
        np.full(len(calibrated), UNDECIDED) if one[rule] is None else np.asarray(calibrated)[:, one["class"]] >= one[rule]["threshold"]
        for one in fitted["classes"]
    ]
    return np.stack(columns, axis=1).astype(np.int8)


def of_run(run_folder: folder.RunFolder, *, task: str, seeds: Sequence[int]) -> dict[str, Any]:
    """The calibration of a finished run of these seeds; of one that an older version finished, fitted now.

    InputError where files are absent or broken, or not of this run.
    """
    record, path = run_folder.read_calibration(), run_folder.calibration
    if record is None:
        path, predictions = run_folder.predictions("val"), run_folder.read_predictions("val")
        try:
            record = fit(task, predictions.labels, predictions.probabilities, seeds=predictions.seeds.tolist())
        except (ValueError, IndexError) as error:  # the folder vouches for shapes and kinds, not that they are this task's
            raise config_lib.InputError(f"{path} does not hold predictions of a {task} task: {error}") from error
    if fault := _fault(record, task, list(seeds)):
        raise config_lib.InputError(f"{path} is not of this run: {fault}; restore it from a copy")
    return record


def _fault(record: Mapping[str, Any], task: str, seeds: list[int]) -> str | None:
    """What in a calibration that matches the schema is not of a run, or does not fit together."""
    if record["task"] != task or record["seeds"] != seeds:
        return f"it is of task {record['task']} and seeds {record['seeds']}, the run of {task} and {seeds}"
    fitted = [*record["of_seeds"], record["ensemble"]]
    classes = [[one["class"] for one in each["classes"]] for each in fitted if each]
    if len(record["of_seeds"]) != len(seeds) or any(there != scored(task, record["num_classes"]) for there in classes):
        return "it has not one entry for each seed and class"
    if (record["ensemble"] is None) != (not any(record["of_seeds"])):
        return "its ensemble is not that of its seeds"
    return None
