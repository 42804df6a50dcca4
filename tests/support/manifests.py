"""Checks manifests for KubeRay and configurations of Ray Serve without a cluster: schemas, and what must agree between
two places.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from decimal import Decimal
from functools import cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from rafce_ray.base.errors import RafceError
from rafce_ray.serve.deployment import SETTINGS, read_live_version
from rafce_ray.serve.fast_path import variables
from rafce_ray.service.config import read_service_config

HERE = Path(__file__).parent
BUILDER = "rafce_ray.serve.deployment:build_app"
OF_THE_MACHINE = "RAY_SERVE_HAPROXY_NBTHREAD"
"""The one variable of the fast path that depends on the machine."""


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that a mapping has twice is an error; PyYAML would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", node.value[position][0].start_mark
                )
        return super().construct_mapping(node, deep)


def faults_of(text: str, production: Any) -> list[str]:
    """What is wrong with the documents of a text, one line each; ``production``: what every ``serveConfigV2`` must
    say.
    """
    try:
        documents = list(yaml.load_all(text, UniqueKeys))
    except yaml.YAMLError as error:
        return [str(error)]
    config_maps = {one["metadata"]["name"]: one["data"] for one in documents if one.get("kind") == "ConfigMap"}
    faults = []
    for document in documents:
        name = document.get("kind", "")
        broken = list(_schema_faults("kuberay.yaml", name, document) if name else serve_faults(document))
        faults += broken or ([*_rule_faults(document, config_maps, production)] if name else [])
    return faults


@cache
def _definitions(file: str) -> dict[str, Any]:
    return dict(yaml.safe_load((HERE / file).read_text())["$defs"])


def _schema_faults(file: str, name: str, document: Any) -> Iterator[str]:
    if name not in _definitions(file):
        yield f"kind: {name!r} has no schema"
        return
    validator = Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": _definitions(file)})
    for error in validator.iter_errors(document):
        yield f"{error.json_path.removeprefix('$.')}: {error.message}"


def serve_faults(config: Any) -> Iterator[str]:
    """What Ray Serve or the service refuses of a Serve configuration, and keys that Serve ignores without an error."""
    yield from _unknown_keys(config, ServeDeploySchema, "")
    try:
        ServeDeploySchema.model_validate(config)
        for application in config["applications"]:
            if application["import_path"] != BUILDER:
                yield f"import_path: {application['import_path']!r} instead of {BUILDER!r}"
            read_service_config(application["args"])
            for deployment in application["deployments"]:
                if deployment["name"] != SETTINGS["name"]:
                    yield f"deployments.name: {deployment['name']!r} instead of {SETTINGS['name']!r}"
                read_live_version(deployment["user_config"])
    except (ValidationError, RafceError) as error:
        yield str(error)


def _unknown_keys(values: Any, annotation: Any, place: str) -> Iterator[str]:
    """Keys that no model in ``annotation`` has; mappings that take anything are not searched."""
    for value in values if isinstance(values, list) else ():
        yield from _unknown_keys(value, annotation, place)
    fields = {name: field for model in _models(annotation) for name, field in model.model_fields.items()}
    for key, value in values.items() if isinstance(values, dict) and fields else ():
        if key in fields:
            yield from _unknown_keys(value, fields[key].annotation, f"{place}{key}.")
        else:
            yield f"{place}{key}: unknown key"


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _rule_faults(document: Any, config_maps: Mapping[str, Any], production: Any) -> Iterator[str]:
    kind, spec = document["kind"], document.get("spec", {})
    if kind not in ("RayCluster", "RayJob", "RayService"):
        return
    yield from _schema_faults("manifest_rules.yaml", kind, document)
    cluster = {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec"), "RayService": spec.get("rayClusterConfig")}[
        kind
    ]
    if cluster["rayVersion"] != version("ray"):
        yield f"rayVersion: {cluster['rayVersion']!r} instead of {version('ray')!r}"
    for group in cluster["workerGroupSpecs"]:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"replicas: {group['replicas']} is not from minReplicas to maxReplicas"
    for pod in _pods(cluster):
        for container in _containers(pod):
            for mount in container.get("volumeMounts", ()):
                if mount["name"] not in [volume["name"] for volume in pod.get("volumes", ())]:
                    yield f"volumeMounts: the pod has no volume {mount['name']!r}"
            for source in container.get("envFrom", ()):
                if "configMapRef" in source and source["configMapRef"]["name"] not in config_maps:
                    yield f"configMapRef: there is no ConfigMap {source['configMapRef']['name']!r}"
    if kind == "RayJob":
        yield from _entrypoint_faults(shlex.split(spec["entrypoint"]), cluster)
    if kind == "RayService":
        try:
            config = yaml.load(spec["serveConfigV2"], UniqueKeys)
        except yaml.YAMLError as error:
            yield f"serveConfigV2: {error}"
            return
        yield from (f"serveConfigV2.{fault}" for fault in serve_faults(config))
        if config != {**production, "http_options": {**production["http_options"], "host": "0.0.0.0"}}:
            yield "serveConfigV2: not serve/production.yaml's with http_options.host 0.0.0.0"
        for pod in _pods(cluster):
            yield from _fast_path_faults(pod, config_maps, config["http_options"]["port"])
        for pod in _pods(cluster)[1:]:
            yield from _fit_faults(config["applications"][0], pod)


def _pods(cluster: Any) -> list[Any]:
    """The specs of a cluster's pods, the head's first."""
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def _containers(pod: Any) -> list[Any]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


def _volume(path: str, container: Any, pod: Any) -> Any:
    """The volume on which a path of a container lies; None where it lies on the container's own disk."""
    mounts = [one for one in container.get("volumeMounts", ()) if PurePosixPath(path).is_relative_to(one["mountPath"])]
    name = max(mounts, key=lambda mount: len(mount["mountPath"]), default={}).get("name")
    return next((volume for volume in pod.get("volumes", ()) if volume["name"] == name), None)


def _entrypoint_faults(words: list[str], cluster: Any) -> Iterator[str]:
    """Places of a study that are lost with their pod, or differ between machines."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    for key in ("storage", "base.data.root", "base.data.store_dir"):
        for pod in _pods(cluster):
            volume = _volume(given.get(key, ""), pod["containers"][0], pod)
            if "://" not in given.get(key, "") and (volume is None or "emptyDir" in volume):
                yield f"entrypoint: {key}={given.get(key, '')} is not on a volume that all pods share"


def _fast_path_faults(pod: Any, config_maps: Mapping[str, Any], port: int) -> Iterator[str]:
    """HAProxy's environment, its program, and the port that it takes requests at."""
    container = pod["containers"][0]
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        found |= config_maps.get(source.get("configMapRef", {}).get("name"), {})
    folder = "/tmp/rafce"
    for name, value in (variables(Path(folder)) | {"RAFCE_SERVE_HOST": "0.0.0.0"}).items():
        if found.get(name) != value and (name != OF_THE_MACHINE or name not in found):
            yield f"env: {name} is {found.get(name)!r} instead of {value!r}"
    makers = [
        one for one in pod.get("initContainers", ()) if one["command"][-2:] == ["rafce_ray.serve.fast_path", folder]
    ]
    if not any(_volume(folder, one, pod) == _volume(folder, container, pod) is not None for one in makers):
        yield f"initContainers: none makes {folder} on a volume of {container['name']}"
    if {"name": "serve", "containerPort": port} not in container["ports"]:
        yield f"ports: {container['name']} has no port named serve, {port}"


def _fit_faults(application: Any, pod: Any) -> Iterator[str]:
    """Files that a worker does not have, and replicas that it cannot hold."""
    container, arguments = pod["containers"][0], application["args"]
    if arguments.get("loopback_only", True):
        yield "args.loopback_only: every request from outside the pod is refused"
    for key, kinds in (("registry", {"persistentVolumeClaim"}), ("keys_file", {"secret", "csi"})):
        if not kinds & (_volume(arguments[key], container, pod) or {}).keys():
            yield f"args.{key}: {arguments[key]} is on no {' or '.join(sorted(kinds))} of the workers"
    for deployment in application["deployments"]:
        for key, resource in (("num_cpus", "cpu"), ("num_gpus", "nvidia.com/gpu")):
            room = Decimal(str(container["resources"]["limits"].get(resource, 0)))
            if deployment["ray_actor_options"].get(key, 0) > room:
                yield f"ray_actor_options.{key}: more than the {room} {resource} of a worker"
