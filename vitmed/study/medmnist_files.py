"""Predictions as MedMNIST's own result files, which `python -m medmnist evaluate` reads."""

from vitmed.study import collection


def of_run(run: collection.Run) -> dict[str, str]:
    """{file name: text} of a run's test predictions, a file per seed; empty where the data set is none of MedMNIST's.

    The name is the evaluator's: {flag}[_{size}]_test_[AUC]x_[ACC]y@run.csv, where run has no dot or underscore that it would split at.
    A row is the image's index and its probabilities, with the nine digits that tell float32 numbers apart.
    """
    flag, size = run.result["dataset"], run.config["data.size"]
    if not flag.endswith(("mnist", "mnist3d")):
        return {}
    named = flag if size == 28 else f"{flag}_{size}"
    files = {}
    for index, seed in enumerate(run.seeds):
        auc, accuracy = (run.of_seeds("test", name)[index] for name in ("auc", "accuracy"))
        label = f"{run.path.name}-seed{seed}".replace(".", "-").replace("@", "-")
        rows = [",".join([str(row), *(f"{value:.9g}" for value in values)]) for row, values in enumerate(run.probabilities[index].tolist())]
        score = "nan" if auc is None else f"{auc:.3f}"
        files[f"{named}_test_[AUC]{score}_[ACC]{accuracy:.3f}@{label}.csv"] = "\n".join(rows) + "\n"
    return files
