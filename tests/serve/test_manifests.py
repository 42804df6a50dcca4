"""The manifests are what KubeRay, Kubernetes, Ray Serve and the service take, and safe; every mistake planted in them is named."""

import copy
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonpatch
import pytest
import yaml

from rafce_ray.serve.fast_path import variables
from rafce_ray.serve.manifests.command import check, main
from rafce_ray.study.config import load_study

REPOSITORY = Path(__file__).parents[2]
SERVE = REPOSITORY / "serve"
MANIFESTS = ("storage.yaml", "rayservice.yaml", "raycluster.yaml", "rayjob-tune.yaml")
PRODUCTION = yaml.safe_load((SERVE / "production.yaml").read_text())
WANTED = ("serve/production.yaml", PRODUCTION)


@cache
def plain(name: str) -> str:
    """Documents of a manifest as JSON, in which no two places are the same object."""
    return json.dumps(list(yaml.safe_load_all((SERVE / name).read_text())))


def load(name: str) -> list[Any]:
    """Documents of a manifest, to be changed at will."""
    return list(json.loads(plain(name)))


def faults_of(*documents: list[Any]) -> list[str]:
    """What is found in files with these documents."""
    return check([(f"file{index}.yaml", json_lines(one)) for index, one in enumerate(documents)], WANTED)[0]


def json_lines(documents: list[Any]) -> str:
    """Documents as YAML that is read quickly: JSON is YAML."""
    return "\n---\n".join(json.dumps(one) for one in documents)


def test_all_that_ships_is_without_fault(capsys):
    files = [str(path) for path in sorted(SERVE.glob("*.yaml"))]
    assert len(files) == len(MANIFESTS) + 3, "a file of serve/ that this test does not know"
    assert main([*files, "--serve-config", str(SERVE / "production.yaml")]) == 0
    assert "kustomization.yaml:2: Kustomization: not looked through" in capsys.readouterr().err


def test_the_service_runs_the_production_file_but_for_the_address_at_which_pods_reach_each_other():
    _, service = load("rayservice.yaml")
    found = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert PRODUCTION["http_options"]["host"] == "127.0.0.1"
    assert found == {**PRODUCTION, "http_options": {**PRODUCTION["http_options"], "host": "0.0.0.0"}}


def test_the_config_map_is_what_the_fast_path_prints():
    config_map, _ = load("rayservice.yaml")
    printed = variables(Path("/tmp/rafce"))
    assert config_map["data"] == {
        **printed,
        # Half of a worker's CPUs instead of this machine's.
        "RAY_SERVE_HAPROXY_NBTHREAD": "2",
        "RAFCE_SERVE_HOST": "0.0.0.0",
    }


def test_the_jobs_entrypoint_is_a_study(tmp_path):
    (job,) = load("rayjob-tune.yaml")
    python, dash_m, module, dash_dash_config, file, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (python, dash_m, module, dash_dash_config) == ("python", "-m", "rafce_ray.tune", "--config")
    # The image has the folder tune_configs in /opt/rafce (Dockerfile).
    study = load_study(str(REPOSITORY / Path(file).relative_to("/opt/rafce")), overrides)
    assert study.storage == "/srv/rafce/runs"
    assert study.base_config().data.root == "/srv/rafce/faces"


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

# Name -> file, how it is planted, and what must be said of it: its place, what was found, what was expected.
MISTAKES: dict[str, tuple[str, Callable[[Any], None], tuple[str, ...]]] = {
    "key misspelt in spec": (
        CLUSTER,
        put("spec", "enableInTreeAutoscalling", True),
        ("spec.enableInTreeAutoscalling: found an unknown key", "did you mean 'enableInTreeAutoscaling'?"),
    ),
    "key misspelt in a container": (
        JOB,
        put("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "volumeMount", []),
        (
            "spec.rayClusterSpec.headGroupSpec.template.spec.containers[0].volumeMount: found an unknown key",
            "'volumeMounts'?",
        ),
    ),
    "key misspelt in a probe": (
        SERVICE,
        put(*WORKER, "readinessProbe", "periodSecond", 5),
        ("containers[0].readinessProbe.periodSecond: found an unknown key", "did you mean 'periodSeconds'?"),
    ),
    "number instead of text": (
        CLUSTER,
        put("spec", "headGroupSpec", "rayStartParams", "num-cpus", 0),
        ("spec.headGroupSpec.rayStartParams.num-cpus: found 0 (int); expected string",),
    ),
    "wrong apiVersion": (
        SERVICE,
        put("apiVersion", "ray.io/v1alpha1"),
        ("apiVersion: found 'ray.io/v1alpha1'; expected 'ray.io/v1'",),
    ),
    "kind misspelt": (CLUSTER, put("kind", "RayClutser"), ("kind: found 'RayClutser'", "did you mean 'RayCluster'?")),
    "no image": (
        CLUSTER,
        drop("spec", "headGroupSpec", "template", "spec", "containers", 0, "image"),
        ("image: found nothing",),
    ),
    "image without a tag": (
        SERVICE,
        put(*WORKER, "image", "rafce_ray"),
        ("image: found 'rafce_ray'; expected a name with a tag",),
    ),
    "another Ray": (
        JOB,
        put("spec", "rayClusterSpec", "rayVersion", "2.59.0"),
        ("rayVersion: found '2.59.0'; expected '2.60.0'",),
    ),
    "head with CPUs": (
        SERVICE,
        put(*CONFIG, "headGroupSpec", "rayStartParams", "num-cpus", "4"),
        ("spec.rayClusterConfig.headGroupSpec.rayStartParams.num-cpus: found '4'; expected '0'",),
    ),
    "another Serve configuration": (
        SERVICE,
        serve(put("applications", 0, "args", "limits", "max_requests", 640)),
        (
            "spec.serveConfigV2.applications[0].args.limits.max_requests: found 640; expected 64, as serve/production.yaml has it",
        ),
    ),
    "key of a deployment misspelt": (
        SERVICE,
        serve(put(*DEPLOYMENT, "max_ongoing_request", 512)),
        (
            "spec.serveConfigV2.applications[0].deployments[0].max_ongoing_request: found an unknown key",
            "'max_ongoing_requests'?",
        ),
    ),
    "key of the autoscaling misspelt": (
        SERVICE,
        serve(put(*DEPLOYMENT, "autoscaling_config", "max_replica", 4)),
        ("deployments[0].autoscaling_config.max_replica: found an unknown key", "did you mean 'max_replicas'?"),
    ),
    "wrong type for Serve": (
        SERVICE,
        serve(put(*DEPLOYMENT, "max_queued_requests", "many")),
        ("spec.serveConfigV2.applications[0].deployments[0].max_queued_requests: found 'many'", "valid integer"),
    ),
    "deployment that is not there": (
        SERVICE,
        serve(put(*DEPLOYMENT, "name", "rafec")),
        ("spec.serveConfigV2.applications[0].deployments[0].name: found 'rafec'; expected 'rafce'",),
    ),
    "typo in the service's arguments": (
        SERVICE,
        serve(put("applications", 0, "args", "limits", "deadline", 5)),
        ("spec.serveConfigV2.applications[0].args", "limits.deadline: unknown key; did you mean 'limits.deadline_s'?"),
    ),
    "keys without their secret": (
        SERVICE,
        without_volume("keys"),
        (
            "args.keys_file: found '/etc/rafce/keys.json', which the pods of group workers do not have",
            "a file of a mounted secret",
        ),
    ),
    "secret without a name": (
        SERVICE,
        put(*CONFIG, "workerGroupSpecs", 0, "template", "spec", "volumes", 3, "secret", {"defaultMode": 288}),
        ("volumes[3].secret.secretName: found nothing; expected string",),
    ),
    "registry on no volume": (
        SERVICE,
        without_volume("shared"),
        ("args.registry: found '/srv/rafce/registry'", "a folder on a mounted volume"),
    ),
    "probe on another path": (
        SERVICE,
        put(*WORKER, "readinessProbe", "httpGet", "path", "/-/healthz"),
        (
            "workerGroupSpecs[0].template.spec.containers[0].readinessProbe.httpGet.path: found '/-/healthz'; expected '/readyz'",
        ),
    ),
    "no authentication": (
        CLUSTER,
        drop("spec", "authOptions"),
        ("spec.authOptions.mode: found nothing; expected 'token'", "CVE-2023-48022"),
    ),
    "authentication off": (
        JOB,
        put("spec", "rayClusterSpec", "authOptions", "mode", "disabled"),
        ("authOptions.mode: found 'disabled'",),
    ),
    "no network policy": (
        SERVICE,
        drop(*CONFIG, "networkPolicy"),
        ("spec.rayClusterConfig.networkPolicy.mode: found nothing",),
    ),
    "dashboard open to all": (
        CLUSTER,
        put("spec", "networkPolicy", "head", "ingressRules", 1, "from", [{"ipBlock": {"cidr": "0.0.0.0/0"}}]),
        ("spec.networkPolicy.head.ingressRules[1].from[0].ipBlock.cidr: found '0.0.0.0/0'",),
    ),
    "operator shut out": (
        SERVICE,
        drop(*CONFIG, "networkPolicy", "head", "ingressRules", 0),
        ("spec.rayClusterConfig.networkPolicy.head.ingressRules: found no rule for the operator",),
    ),
    "dashboard behind a load balancer": (
        CLUSTER,
        put("spec", "headGroupSpec", "serviceType", "LoadBalancer"),
        ("spec.headGroupSpec.serviceType: found 'LoadBalancer'; expected 'ClusterIP'",),
    ),
    "root": (
        SERVICE,
        put(*SECURITY, "runAsUser", 0),
        ("containers[0].securityContext.runAsUser: found 0; expected a user that is not root",),
    ),
    "may become root": (
        SERVICE,
        drop(*SECURITY, "allowPrivilegeEscalation"),
        ("securityContext.allowPrivilegeEscalation: found nothing",),
    ),
    "disk that can be written": (
        SERVICE,
        put(*SECURITY, "readOnlyRootFilesystem", False),
        ("containers[0].securityContext.readOnlyRootFilesystem: found false; expected true",),
    ),
    "no bound of memory": (
        SERVICE,
        drop(*WORKER, "resources", "limits", "memory"),
        ("resources.limits.memory: found nothing",),
    ),
    "more than a worker has": (
        SERVICE,
        serve(put(*DEPLOYMENT, "ray_actor_options", "num_gpus", 1)),
        (
            "ray_actor_options.num_gpus: found 1; expected no more than a worker has (0 by resources.limits of nvidia.com/gpu)",
        ),
    ),
    "Serve's Python proxy": (
        SERVICE,
        drop(*WORKER, "envFrom"),
        ("containers[0].env.RAY_SERVE_ENABLE_HA_PROXY: found nothing; expected '1'",),
    ),
    "no program for HAProxy": (
        SERVICE,
        drop(*CONFIG, "workerGroupSpecs", 0, "template", "spec", "initContainers"),
        ("template.spec.initContainers: found none that makes /tmp/rafce",),
    ),
    "results that end with their pod": (
        JOB,
        put(
            "spec",
            "entrypoint",
            "python -m rafce_ray.tune storage=/tmp/runs base.data.root=s3://b/f base.data.store_dir=s3://b/s",
        ),
        ("spec.entrypoint: found storage=/tmp/runs; expected a URI, or a folder on a volume that all pods share",),
    ),
    "results in a folder of the job's": (
        JOB,
        put("spec", "entrypoint", "python -m rafce_ray.tune base.data.root=s3://b/f base.data.store_dir=s3://b/s"),
        ("spec.entrypoint: found no storage=",),
    ),
}


def test_at_least_twelve_mistakes_are_planted():
    assert len(MISTAKES) >= 12


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_named(mistake):
    file, plant, expected = MISTAKES[mistake]
    planted = load(file)
    plant(planted[-1])
    assert planted != load(file)
    faults = faults_of(planted)
    assert any(all(words in fault for words in expected) for fault in faults), faults


def test_a_key_that_stands_twice_is_named_with_its_line():
    text = (SERVE / CLUSTER).read_text() + "  rayVersion: 2.60.0\n"
    faults, _ = check([("edited.yaml", text)])
    lines = text.splitlines()
    first = lines.index("  rayVersion: 2.60.0") + 1
    assert faults == [
        f"edited.yaml:{len(lines)}: RayCluster rafce-cluster: spec.rayVersion: found the key a second time "
        f"(first on line {first}); expected each key once."
    ]


def test_a_fault_inside_the_serve_configuration_has_its_line_in_the_file():
    text = (SERVE / SERVICE).read_text().replace("max_surge_percent: 100", "max_surge_percnt: 100")
    (fault,) = check([("edited.yaml", text)])[0]
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "max_surge_percnt" in line)
    assert fault.startswith(
        f"edited.yaml:{line}: RayService rafce: spec.serveConfigV2.applications[0].deployments[0].max_surge_percnt"
    )


def test_exit_codes_and_messages(tmp_path, capsys):
    edited = tmp_path / "edited.yaml"
    edited.write_text((SERVE / CLUSTER).read_text().replace("mode: token", "mode: disabled"))
    assert main([str(edited)]) == 1
    assert f"{edited}:" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere.yaml")]) == 2
    assert "nowhere.yaml cannot be read" in capsys.readouterr().err
    edited.write_text("spec: [")
    assert main([str(edited)]) == 2
    assert "is not YAML" in capsys.readouterr().err
    edited.write_text("spec: {}")
    assert main([str(edited)]) == 1
    assert "kind: found nothing; expected an object with a kind" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (put("applications", 0, "args", "engin", "torch"), "engin: unknown key; did you mean 'engine'?"),
        (
            put("http_options", "prot", 8000),
            "http_options.prot: found an unknown key; expected a key of HTTPOptionsSchema; did you mean 'port'?",
        ),
        (
            put("applications", 0, "import_path", "rafce_ray.serve:build"),
            "applications[0].import_path: found 'rafce_ray.serve:build'",
        ),
        (put(*DEPLOYMENT, "user_config", {"versoin": "a"}), "versoin: unknown key; did you mean 'version'?"),
        (
            drop("applications", 0, "deployments", 0, "name"),
            "applications[0].deployments[0].name: found nothing; expected Field required",
        ),
    ],
)
def test_serve_configurations_are_looked_through_as_well(change, expected):
    config = copy.deepcopy(PRODUCTION)
    change(config)
    (fault,) = faults_of([config])
    assert expected in fault


def rendered(overlay: str) -> str:
    """An overlay as kustomize makes it: the base's documents, other images, patches (RFC 6902). No other key is known here."""
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
    assert check([(overlay, text)], WANTED)[0] == []
    documents = list(yaml.safe_load_all(text))
    workers = [one for one in containers(documents) if one["name"] == "ray-worker"]
    assert len(workers) == 3
    wanted = {"cpu": None, "gpu": "1"}[overlay]
    assert [one["resources"]["limits"].get("nvidia.com/gpu") for one in workers] == [wanted] * 3
    assert {one["image"] for one in containers(documents)} == {
        {"cpu": "rafce_ray:0.1.0", "gpu": "rafce_ray:0.1.0-gpu"}[overlay]
    }


@pytest.mark.slow
def test_the_program_reads_standard_input():
    done = subprocess.run(
        [sys.executable, "-m", "rafce_ray.serve.manifests", "-"],
        input=rendered("gpu"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
