"""What a RayService must be beside its cluster: the fast path's environment, probes, and a configuration that Serve takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from rafce_ray.serve.fast_path import variables
from rafce_ray.serve.haproxy import HOST
from rafce_ray.serve.manifests.clusters import cluster_faults, templates
from rafce_ray.serve.manifests.documents import MISSING, Fault, Place, at
from rafce_ray.serve.manifests.pods import ConfigMaps, environment_of, volume_at

CONFIG: Place = ("spec", "serveConfigV2")
CLUSTER: Place = ("spec", "rayClusterConfig")
READY = "/readyz"
OF_THE_MACHINE = "RAY_SERVE_HAPROXY_NBTHREAD"
"""The one variable of the fast path that depends on the machine."""

MAY_DIFFER: tuple[Place, ...] = (("http_options", "host"),)
"""Where a RayService's configuration may differ from the one it is compared with: pods are machines of their own."""


def service_faults(spec: Mapping[str, Any], config: Any, config_maps: ConfigMaps) -> Iterator[Fault]:
    """What is wrong with a RayService; ``config``: its ``serveConfigV2`` as plain values, or MISSING where Serve would not take it."""
    cluster = spec["rayClusterConfig"]
    yield from cluster_faults(cluster, CLUSTER, config_maps)
    if spec.get("excludeHeadPodFromServeSvc") is not True:
        yield Fault(
            ("spec", "excludeHeadPodFromServeSvc"),
            repr(spec.get("excludeHeadPodFromServeSvc", MISSING)),
            "true",
            "The network policy lets no client's request come to the head.",
        )
    if not cluster.get("workerGroupSpecs"):
        yield Fault((*CLUSTER, "workerGroupSpecs"), "nothing", "a group of workers", "The head computes nothing.")
    port = at(config, "http_options", "port")
    for template, place in templates(cluster, CLUSTER):
        here = (*place, "spec", "containers", 0)
        container = template["spec"]["containers"][0]
        yield from _port_faults(container, here, 8000 if port is MISSING else port)
        yield from _fast_path_faults(template["spec"], (*place, "spec"), config_maps)
        if "workerGroupSpecs" in place:
            yield from _probe_faults(container, here)
    if config is not MISSING:
        yield from _fit_faults(config, cluster)


def _port_faults(container: Mapping[str, Any], place: Place, port: int) -> Iterator[Fault]:
    ports = {one.get("name"): one["containerPort"] for one in container.get("ports", ())}
    if ports.get("serve") != port:
        yield Fault(
            (*place, "ports"),
            f"serve: {ports.get('serve', MISSING)!r}",
            f"a port named serve, {port}, as in serveConfigV2's http_options.port",
            "KubeRay makes the service's port of the head's, and the probe asks the workers'.",
        )


def _probe_faults(container: Mapping[str, Any], place: Place) -> Iterator[Fault]:
    path = at(container, "readinessProbe", "httpGet", "path")
    if path != READY:
        yield Fault(
            (*place, "readinessProbe", "httpGet", "path"),
            repr(path),
            repr(READY),
            "Nothing else says that a pod gives the answers that it should.",
        )
    port = at(container, "readinessProbe", "httpGet", "port")
    numbers = [one["containerPort"] for one in container.get("ports", ()) if one.get("name") == "serve"]
    if port not in ("serve", *numbers):
        yield Fault((*place, "readinessProbe", "httpGet", "port"), repr(port), "'serve'")


def _fast_path_faults(pod: Mapping[str, Any], place: Place, config_maps: ConfigMaps) -> Iterator[Fault]:
    """Variables of HAProxy that are missing or differ, and the program that they name."""
    found = environment_of(pod["containers"][0], config_maps)
    program = found.get("RAY_SERVE_HAPROXY_BINARY_PATH", "/tmp/rafce/haproxy")
    folder = Path(program).parent
    wanted = variables(folder) | {HOST: "0.0.0.0"}
    for name, value in wanted.items():
        if found.get(name) != value and (name != OF_THE_MACHINE or name not in found):
            yield Fault(
                (*place, "containers", 0, "env", name),
                repr(found.get(name, MISSING)),
                repr(value),
                f"python -m rafce_ray.serve.fast_path {folder} prints them all.",
            )
    commands = [
        [*container.get("command", ()), *container.get("args", ())] for container in pod.get("initContainers", ())
    ]
    if not any("rafce_ray.serve.fast_path" in command and str(folder) in command for command in commands):
        yield Fault(
            (*place, "initContainers"),
            f"none that makes {folder}",
            f"one that runs python -m rafce_ray.serve.fast_path {folder}",
            "Ray starts HAProxy by a program that lies there.",
        )
    volumes = [
        volume_at(str(folder), container, pod) for container in (*pod.get("initContainers", ()), pod["containers"][0])
    ]
    if volumes[-1] is None or volumes[-1] not in volumes[:-1]:
        yield Fault(
            (*place, "containers", 0, "volumeMounts"),
            f"{folder} on no volume that the init container writes",
            "the same volume in both",
        )


def _fit_faults(config: Any, cluster: Mapping[str, Any]) -> Iterator[Fault]:
    """Whether Serve's configuration and the pods belong together."""
    if at(config, "http_options", "host") != "0.0.0.0":
        yield Fault(
            (*CONFIG, "http_options", "host"),
            repr(at(config, "http_options", "host")),
            "'0.0.0.0'",
            "HAProxy of one pod must reach the replicas of the others.",
        )
    groups = cluster.get("workerGroupSpecs", ())
    for number, application in enumerate(config.get("applications", ())):
        place = (*CONFIG, "applications", number)
        arguments = application.get("args", {})
        if arguments.get("loopback_only", True):
            yield Fault(
                (*place, "args", "loopback_only"),
                repr(arguments.get("loopback_only", MISSING)),
                "false",
                "Else every request from outside its own pod is refused.",
            )
        for group in groups:
            pod = group["template"]["spec"]
            for key in ("registry", "bundle", "keys_file"):
                path = arguments.get(key)
                if path is None or "://" in path:
                    continue
                volume = volume_at(path, pod["containers"][0], pod)
                wanted = (
                    "a file of a mounted secret" if key == "keys_file" else "a folder on a mounted volume, or a URI"
                )
                if volume is None or ("secret" not in volume and "csi" not in volume if key == "keys_file" else False):
                    yield Fault(
                        (*place, "args", key),
                        f"{path!r}, which the pods of group {group['groupName']} do not have",
                        wanted,
                        "Mount it there (volumes and volumeMounts).",
                    )
        for index, deployment in enumerate(application.get("deployments", ())):
            yield from _room_faults(
                deployment.get("ray_actor_options", {}), (*place, "deployments", index, "ray_actor_options"), groups
            )


def _room_faults(options: Mapping[str, Any], place: Place, groups: Any) -> Iterator[Fault]:
    """A replica that no worker can hold."""
    for key, resource in (("num_cpus", "cpu"), ("num_gpus", "nvidia.com/gpu")):
        wanted = options.get(key) or 0
        rooms = [
            _number(at(group["template"]["spec"]["containers"][0], "resources", "limits", resource)) for group in groups
        ]
        if wanted > max(rooms, default=0):
            yield Fault(
                (*place, key),
                repr(wanted),
                f"no more than a worker has ({max(rooms, default=0):g} by resources.limits of {resource})",
                "A replica that finds no place waits for ever.",
            )


def _number(quantity: Any) -> float:
    """CPUs or GPUs of a Kubernetes quantity (``4``, ``"500m"``)."""
    if quantity is MISSING:
        return 0.0
    text = str(quantity)
    return float(Decimal(text[:-1]) / 1000 if text.endswith("m") else Decimal(text))


def differences(found: Any, wanted: Any, file: str, place: Place = ()) -> Iterator[Fault]:
    """Where a Serve configuration differs from another one, but for :data:`MAY_DIFFER`."""
    if place in MAY_DIFFER:
        return
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in {**wanted, **found}:
            yield from differences(found.get(key, MISSING), wanted.get(key, MISSING), file, (*place, key))
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for index, pair in enumerate(zip(found, wanted, strict=True)):
            yield from differences(*pair, file, (*place, index))
    elif found != wanted:
        yield Fault(place, repr(found), f"{wanted!r}, as {file} has it", "Change both, or neither.")
