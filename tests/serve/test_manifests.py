"""KubeRay, Kubernetes, Ray Serve and the service accept what ships in serve/ and kustomize/; the check finds planted
mistakes.
"""

import json
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonpatch
import pytest
import yaml
from manifests import faults_of, serve_faults

from rafce_ray.study.config import load_study

REPOSITORY = Path(__file__).parents[2]
SERVE = REPOSITORY / "serve"
MANIFESTS = ("storage.yaml", "rayservice.yaml", "raycluster.yaml", "rayjob-tune.yaml")
PRODUCTION = yaml.safe_load((SERVE / "production.yaml").read_text())


@cache
def plain(name: str) -> str:
    """Documents of a manifest as JSON, in which no two places are the same object."""
    return json.dumps(list(yaml.safe_load_all((SERVE / name).read_text())))


def load(name: str) -> list[Any]:
    """Documents of a manifest, to be changed at will."""
    return list(json.loads(plain(name)))


def json_lines(documents: list[Any]) -> str:
    """Documents as YAML that is read quickly: JSON is YAML."""
    return "\n---\n".join(json.dumps(one) for one in documents)


def test_all_that_ships_is_without_fault():
    files = {path.name for path in SERVE.glob("*.yaml")}
    assert files == {*MANIFESTS, "kustomization.yaml", "local.yaml", "production.yaml"}
    for file in files - {"kustomization.yaml"}:
        assert faults_of((SERVE / file).read_text(), PRODUCTION) == [], file


def test_the_jobs_entrypoint_is_a_study():
    (job,) = load("rayjob-tune.yaml")
    python, dash_m, module, dash_dash_config, file, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (python, dash_m, module, dash_dash_config) == ("python", "-m", "rafce_ray.tune", "--config")
    # The image has the folder tune_configs in /opt/rafce (Dockerfile).
    study = load_study(str(REPOSITORY / Path(file).relative_to("/opt/rafce")), overrides)
    assert study.storage == "/srv/rafce/runs"
    assert study.base_config.data.root == "/srv/rafce/faces"


SERVICE, CLUSTER, JOB = "rayservice.yaml", "raycluster.yaml", "rayjob-tune.yaml"
CONFIG = ("spec", "rayClusterConfig")
WORKER = (*CONFIG, "workerGroupSpecs", 0, "template", "spec", "containers", 0)


def put(*place_and_value: Any) -> Callable[[Any], None]:
    """Sets a value, or one more key."""
    *place, last, value = place_and_value

    def plant(document: Any) -> None:
        for part in place:
            document = document[part]
        document[last] = value

    return plant


def drop(*place: Any) -> Callable[[Any], None]:
    def plant(document: Any) -> None:
        for part in place[:-1]:
            document = document[part]
        del document[place[-1]]

    return plant


def serve(change: Callable[[Any], None]) -> Callable[[Any], None]:
    """Plants into the text of ``serveConfigV2``."""

    def plant(document: Any) -> None:
        config = yaml.safe_load(document["spec"]["serveConfigV2"])
        change(config)
        document["spec"]["serveConfigV2"] = yaml.safe_dump(config)

    return plant


def without_volume(name: str) -> Callable[[Any], None]:
    """Takes a volume and its mounts out of the workers' pods."""

    def plant(document: Any) -> None:
        pod = document["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
        pod["volumes"] = [one for one in pod["volumes"] if one["name"] != name]
        mounts = pod["containers"][0]["volumeMounts"]
        pod["containers"][0]["volumeMounts"] = [one for one in mounts if one["name"] != name]

    return plant


DEPLOYMENT = ("applications", 0, "deployments", 0)
SECURITY = (*WORKER, "securityContext")

HEAD = ("spec", "headGroupSpec")
JOB_HEAD = ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0)
ELSEWHERE = "base.data.root=s3://b/f base.data.store_dir=s3://b/s"

# Name -> file, how the mistake is planted, and what the check says.
MISTAKES: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "key misspelt in spec": (CLUSTER, put("spec", "enableInTreeAutoscalling", True), "'enableInTreeAutoscalling'"),
    "key misspelt in a container": (JOB, put(*JOB_HEAD, "volumeMount", []), "'volumeMount' was unexpected"),
    "key misspelt in a probe": (SERVICE, put(*WORKER, "readinessProbe", "periodSecond", 5), "'periodSecond'"),
    "number instead of text": (CLUSTER, put(*HEAD, "rayStartParams", "num-cpus", 0), "0 is not of type 'string'"),
    "wrong apiVersion": (SERVICE, put("apiVersion", "ray.io/v1alpha1"), "apiVersion: 'ray.io/v1' was expected"),
    "kind misspelt": (CLUSTER, put("kind", "RayClutser"), "kind: 'RayClutser' has no schema"),
    "no image": (CLUSTER, drop(*HEAD, "template", "spec", "containers", 0, "image"), "'image' is a required"),
    "image without a tag": (SERVICE, put(*WORKER, "image", "rafce_ray"), "image: 'rafce_ray' does not match"),
    "another Ray": (JOB, put("spec", "rayClusterSpec", "rayVersion", "2.59.0"), "rayVersion: '2.59.0'"),
    "head with CPUs": (SERVICE, put(*CONFIG, "headGroupSpec", "rayStartParams", "num-cpus", "4"), "'0' was expected"),
    "another Serve configuration": (
        SERVICE,
        serve(put("applications", 0, "args", "limits", "max_requests", 640)),
        "serveConfigV2: not serve/production.yaml's",
    ),
    "key of a deployment misspelt": (
        SERVICE,
        serve(put(*DEPLOYMENT, "max_ongoing_request", 512)),
        "serveConfigV2.applications.deployments.max_ongoing_request: unknown key",
    ),
    "key of the autoscaling misspelt": (
        SERVICE,
        serve(put(*DEPLOYMENT, "autoscaling_config", "max_replica", 4)),
        "deployments.autoscaling_config.max_replica: unknown key",
    ),
    "wrong type for Serve": (SERVICE, serve(put(*DEPLOYMENT, "max_queued_requests", "many")), "valid integer"),
    "deployment that is not there": (SERVICE, serve(put(*DEPLOYMENT, "name", "rafec")), "'rafec' instead of 'rafce'"),
    "another builder": (SERVICE, serve(put("applications", 0, "import_path", "rafce_ray.serve:build")), "import_path"),
    "typo in the service's arguments": (
        SERVICE,
        serve(put("applications", 0, "args", "limits", "deadline", 5)),
        "limits.deadline: unknown key; did you mean 'limits.deadline_s'?",
    ),
    "typo in the user's configuration": (
        SERVICE,
        serve(put(*DEPLOYMENT, "user_config", {"versoin": "a"})),
        "versoin: unknown key; did you mean 'version'?",
    ),
    "keys without their secret": (SERVICE, without_volume("keys"), "args.keys_file: /etc/rafce/keys.json is on no"),
    "secret without a name": (
        SERVICE,
        put(*CONFIG, "workerGroupSpecs", 0, "template", "spec", "volumes", 3, "secret", {"defaultMode": 288}),
        "'secretName' is a required property",
    ),
    "registry on no volume": (SERVICE, without_volume("shared"), "args.registry: /srv/rafce/registry is on no"),
    "only this machine answered": (
        SERVICE,
        serve(put("applications", 0, "args", "loopback_only", True)),
        "args.loopback_only: every request",
    ),
    "mount of no volume": (SERVICE, put(*WORKER, "volumeMounts", 0, "name", "tpm"), "the pod has no volume 'tpm'"),
    "no config map": (SERVICE, put(*WORKER, "envFrom", 0, "configMapRef", "name", "fast"), "no ConfigMap 'fast'"),
    "probe on another path": (
        SERVICE,
        put(*WORKER, "readinessProbe", "httpGet", "path", "/-/healthz"),
        "'/readyz' was expected",
    ),
    "port of another number": (SERVICE, put(*WORKER, "ports", 1, "containerPort", 80), "no port named serve, 8000"),
    "more replicas than allowed": (
        CLUSTER,
        put("spec", "workerGroupSpecs", 0, "replicas", 9),
        "replicas: 9 is not from minReplicas",
    ),
    "no authentication": (CLUSTER, drop("spec", "authOptions"), "'authOptions' is a required property"),
    "authentication off": (
        JOB,
        put("spec", "rayClusterSpec", "authOptions", "mode", "disabled"),
        "authOptions.mode: 'token' was expected",
    ),
    "no network policy": (SERVICE, drop(*CONFIG, "networkPolicy"), "'networkPolicy' is a required property"),
    "dashboard open to all": (
        CLUSTER,
        put("spec", "networkPolicy", "head", "ingressRules", 1, "from", [{"ipBlock": {"cidr": "0.0.0.0/0"}}]),
        "spec.networkPolicy.head.ingressRules[1].from[0]",
    ),
    "dashboard open to any pod": (
        CLUSTER,
        put("spec", "networkPolicy", "head", "ingressRules", 1, "from", [{"podSelector": {}}]),
        "spec.networkPolicy.head.ingressRules[1].from[0]",
    ),
    "operator shut out": (
        SERVICE,
        drop(*CONFIG, "networkPolicy", "head", "ingressRules", 0),
        "does not contain items matching the given schema",
    ),
    "dashboard behind a load balancer": (
        CLUSTER,
        put(*HEAD, "serviceType", "LoadBalancer"),
        "'ClusterIP' was expected",
    ),
    "root": (SERVICE, put(*SECURITY, "runAsUser", 0), "runAsUser: 0 is less than the minimum of 1"),
    "may become root": (
        SERVICE,
        drop(*SECURITY, "allowPrivilegeEscalation"),
        "'allowPrivilegeEscalation' is a required property",
    ),
    "disk that can be written": (
        SERVICE,
        put(*SECURITY, "readOnlyRootFilesystem", False),
        "readOnlyRootFilesystem: True was expected",
    ),
    "no bound of memory": (SERVICE, drop(*WORKER, "resources", "limits", "memory"), "'memory' is a required property"),
    "more than a worker has": (
        SERVICE,
        serve(put(*DEPLOYMENT, "ray_actor_options", "num_gpus", 1)),
        "ray_actor_options.num_gpus: more than the 0 nvidia.com/gpu",
    ),
    "Serve's Python proxy": (SERVICE, drop(*WORKER, "envFrom"), "env: RAY_SERVE_ENABLE_HA_PROXY is None"),
    "no program for HAProxy": (
        SERVICE,
        drop(*CONFIG, "workerGroupSpecs", 0, "template", "spec", "initContainers"),
        "initContainers: none makes /tmp/rafce",
    ),
    "cluster that stays": (JOB, drop("spec", "shutdownAfterJobFinishes"), "'shutdownAfterJobFinishes' is a required"),
    "results that end with their pod": (
        JOB,
        put("spec", "entrypoint", f"python -m rafce_ray.tune storage=/tmp/runs {ELSEWHERE}"),
        "entrypoint: storage=/tmp/runs is not on a volume",
    ),
    "results in a folder of the job's": (
        JOB,
        put("spec", "entrypoint", f"python -m rafce_ray.tune {ELSEWHERE}"),
        "entrypoint: storage= is not on a volume",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake):
    file, plant, expected = MISTAKES[mistake]
    planted = load(file)
    plant(planted[-1])
    assert planted != load(file)
    faults = faults_of(json_lines(planted), PRODUCTION)
    assert any(expected in fault for fault in faults), faults


def test_a_key_that_stands_twice_is_found():
    text = (SERVE / CLUSTER).read_text() + "  rayVersion: 2.60.0\n"
    (fault,) = faults_of(text, PRODUCTION)
    assert "duplicate key 'rayVersion'" in fault
    assert f"line {text.count(chr(10))}" in fault


def test_serve_configurations_have_no_unknown_keys():
    assert list(serve_faults({**PRODUCTION, "http_options": {"prot": 8000}})) == ["http_options.prot: unknown key"]


def rendered(overlay: str) -> str:
    """An overlay as kustomize makes it: the base's documents, other images, patches (RFC 6902).

    No other key is known here.
    """
    kustomization = yaml.safe_load((REPOSITORY / "kustomize" / overlay / "kustomization.yaml").read_text())
    assert kustomization.keys() == {"apiVersion", "kind", "resources", "images", "patches"}
    (resource,) = kustomization["resources"]
    base = (REPOSITORY / "kustomize" / overlay / resource).resolve()
    assert base == SERVE
    base_kustomization = yaml.safe_load((base / "kustomization.yaml").read_text())
    assert base_kustomization.keys() == {"apiVersion", "kind", "resources"}
    assert base_kustomization["resources"] == list(MANIFESTS)
    documents = [document for name in base_kustomization["resources"] for document in load(name)]
    for patch in kustomization["patches"]:
        assert patch.keys() == {"target", "patch"}
        (kind,) = patch["target"].values()
        hits = [index for index, document in enumerate(documents) if document["kind"] == kind]
        assert hits, f"the patch of {kind} meets nothing"
        for index in hits:
            documents[index] = jsonpatch.apply_patch(documents[index], yaml.safe_load(patch["patch"]))
    (image,) = kustomization["images"]
    for container in containers(documents):
        name, _, tag = container["image"].partition(":")
        assert name == image["name"]
        assert tag
        container["image"] = f"{name}:{image['newTag']}"
    return json_lines(documents)


def containers(value: Any) -> list[Any]:
    """All containers in a tree."""
    if isinstance(value, list):
        return [found for item in value for found in containers(item)]
    if not isinstance(value, dict):
        return []
    own = [*value.get("containers", ()), *value.get("initContainers", ())]
    return own + [found for item in value.values() for found in containers(item)]


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_an_overlay_is_without_fault_and_asks_for_gpus_or_for_none(overlay):
    text = rendered(overlay)
    assert faults_of(text, PRODUCTION) == []
    documents = list(yaml.safe_load_all(text))
    workers = [one for one in containers(documents) if one["name"] == "ray-worker"]
    assert len(workers) == 3
    wanted = {"cpu": None, "gpu": "1"}[overlay]
    assert [one["resources"]["limits"].get("nvidia.com/gpu") for one in workers] == [wanted] * 3
    assert {one["image"] for one in containers(documents)} == {
        {"cpu": "rafce_ray:0.1.0", "gpu": "rafce_ray:0.1.0-gpu"}[overlay]
    }
