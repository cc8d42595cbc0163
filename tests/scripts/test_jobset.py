"""deploy/jobset.yaml against what JobSet takes, and with itself."""

from pathlib import Path

import pytest
import yaml

TYPES = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list, "any": object}


@pytest.fixture
def manifest(root):
    return yaml.safe_load((root / "deploy" / "jobset.yaml").read_text())


def wrong(value, fields, place="JobSet"):
    """What of a manifest isn't as the fields say, in words."""
    if isinstance(fields, dict):
        if not isinstance(value, dict):
            return [f"{place} is no mapping"]
        known = {name.rstrip("!"): kind for name, kind in fields.items()}
        missing = [f"{place} lacks {name[:-1]}" for name in fields if name.endswith("!") and name[:-1] not in value]
        unknown = [f"{place} has no {name}" for name in value if name not in known and "*" not in known]
        inside = [(item, known.get(name, known.get("*", "any")), f"{place}.{name}") for name, item in value.items()]
        return missing + unknown + [words for one in inside for words in wrong(*one)]
    if isinstance(fields, list):
        if not isinstance(value, list):
            return [f"{place} is no list"]
        return [words for item in value for words in wrong(item, fields[0], f"{place}[]")]
    kinds = fields.split(" or ")
    if kinds[0] not in TYPES:
        return [] if value in fields.split(" | ") else [f"{place} {value} is none of {fields}"]
    right = any(
        isinstance(value, TYPES[kind]) and type(value) is not (bool if kind == "integer" else None) for kind in kinds
    )
    return [] if right else [f"{place} {value!r} is no {fields}"]


FIELDS = yaml.safe_load((Path(__file__).parent / "jobset_fields.yaml").read_text())


def test_it_has_the_fields_of_a_jobset(manifest):
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert wrong(manifest, FIELDS) == []


def test_a_wrong_field_would_be_seen(manifest):
    (job,) = manifest["spec"]["replicatedJobs"]
    job["template"]["spec"]["paralelism"] = 2
    job["template"]["spec"]["completions"] = "2"
    del job["name"]
    manifest["spec"]["failurePolicy"]["rules"][0]["action"] = "Fail"
    assert len(wrong(manifest, FIELDS)) == 4


def test_its_numbers_and_names_agree(manifest):
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert spec["completionMode"] == "Indexed"  # which sets JOB_COMPLETION_INDEX
    assert spec["parallelism"] == spec["completions"] == int(environment["PROCESSES"])
    name = manifest["metadata"]["name"]
    assert environment["COORDINATOR"].split(":")[0] == f"{name}-{job['name']}-0-0.{name}"
    (mesh,) = (argument for argument in container["args"] if argument.startswith("--mesh="))
    assert int(mesh.removeprefix("--mesh=")) == spec["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
