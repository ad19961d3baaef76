"""Hold rendered files against the schemas of those who will read them: {file name: text} as JSON on stdin, a fault a line on stdout.

Run by tests/test_clusters.py with the Python of an environment that has tests/validators.txt; nothing of ours is imported.
"""

import copy
import json
import sys

import yaml


def of_kubernetes(document):
    """Yield what Kubernetes' own schemas say against a document, in the oldest version that has all we use and in the newest known."""
    import kubernetes_validate

    for version in ("1.33", kubernetes_validate.latest_version()):
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{document['kind']}, {version}: {error.message} at {list(error.absolute_path)}"


def of_jobset(document):
    """Yield what speaks against a JobSet: its Jobs by Kubernetes' schema, the rest by the model generated from its CRD.

    That model takes unknown fields without a word; they are those that do not come back.
    """
    from kubeflow_trainer_api.models import jobset_v1alpha2_job_set as jobset

    try:
        yield from unlike(document, jobset.JobsetV1alpha2JobSet.from_dict(document).to_dict(), "JobSet")
    except ValueError as error:
        yield error
    for job in document["spec"]["replicatedJobs"]:
        template = {"metadata": {}} | job["template"]
        yield from of_kubernetes({"apiVersion": "batch/v1", "kind": "Job", **template})


def unlike(given, back, where):
    """Yield the paths of what is lost or changed."""
    if isinstance(given, dict) and isinstance(back, dict):
        for key, value in given.items():
            yield from unlike(value, back[key], f"{where}.{key}") if key in back else [f"{where}.{key}: unknown"]
    elif isinstance(given, list) and isinstance(back, list) and len(given) == len(back):
        for index, (one, other) in enumerate(zip(given, back, strict=True)):
            yield from unlike(one, other, f"{where}[{index}]")
    elif given != back:
        yield f"{where}: {given!r} becomes {back!r}"


def of_skypilot(document):
    """Yield what SkyPilot says against a task; files of this machine are there."""
    import sky
    from sky.utils import schemas

    for path, source in document.get("file_mounts", {}).items():
        if isinstance(source, str):
            document["file_mounts"][path] = __file__
    try:
        sky.Task.from_yaml_config(copy.deepcopy(document), env_overrides=[("VITMED_TASK", "0")])
    except ValueError as error:
        yield error
        return
    schema = schemas.get_resources_schema()["properties"]["job_recovery"]  # SkyPilot's client lets unknown fields of it pass
    known = next(form["properties"] for form in schema["anyOf"] if "properties" in form)
    for field in document["resources"].get("job_recovery", {}).keys() - known.keys():
        yield f"job_recovery.{field}: unknown"


def main():
    """Print the faults."""
    for name, text in json.load(sys.stdin).items():
        for document in yaml.safe_load_all(text):
            check = {"JobSet": of_jobset, None: of_skypilot}.get(document.get("kind"), of_kubernetes)
            for fault in check(document):
                print(f"{name}: {' '.join(str(fault).split())}")


if __name__ == "__main__":
    main()
