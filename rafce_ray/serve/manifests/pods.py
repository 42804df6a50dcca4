"""What every pod of ours must be: no root, bounded, its disk read-only, its references there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from rafce_ray.serve.manifests.documents import MISSING, Fault, Place, at

TAGGED = re.compile(r"(@sha256:[0-9a-f]{64}|:(?!latest$)[\w.-]+)$")
"""The end of an image's name that says which one."""

HOST = ("hostNetwork", "hostPID", "hostIPC")

ConfigMaps = Mapping[str, Mapping[str, str]]
"""Data of the config maps that were given, by their names."""


def pod_faults(spec: Mapping[str, Any], place: Place, config_maps: ConfigMaps) -> Iterator[Fault]:
    """What is wrong with one pod's ``spec``."""
    for key in HOST:
        if spec.get(key):
            yield Fault(
                (*place, key), "true", "false", "A pod that shares the machine's namespaces sees what is not its own."
            )
    profile = at(spec, "securityContext", "seccompProfile", "type")
    if profile not in ("RuntimeDefault", "Localhost"):
        yield Fault((*place, "securityContext", "seccompProfile", "type"), repr(profile), "'RuntimeDefault'")
    volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
    for index, volume in enumerate(spec.get("volumes", ())):
        if "hostPath" in volume:
            yield Fault((*place, "volumes", index, "hostPath"), "a folder of the machine", "a volume of the cluster's")
    for group in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(group, ())):
            here = (*place, group, index)
            yield from _container_faults(container, here, spec.get("securityContext", {}))
            yield from _reference_faults(container, here, volumes, config_maps)


def _container_faults(container: Mapping[str, Any], place: Place, pod: Mapping[str, Any]) -> Iterator[Fault]:
    image = container["image"]
    if not TAGGED.search(image):
        yield Fault(
            (*place, "image"),
            repr(image),
            "a name with a tag that is not latest, or a digest",
            "Else nobody knows what runs.",
        )
    yield from security_faults(container.get("securityContext", {}), (*place, "securityContext"), pod)
    for resource, such_as in (("cpu", "2"), ("memory", "4Gi")):
        if at(container, "resources", "limits", resource) is MISSING:
            yield Fault((*place, "resources", "limits", resource), "nothing", f"a limit, such as {such_as}")


def security_faults(own: Mapping[str, Any], place: Place, pod: Mapping[str, Any]) -> Iterator[Fault]:
    """What a container may that it must not; ``pod``: its pod's security context, which holds where its own says nothing."""
    merged = {**pod, **own}
    for key, wanted in (("allowPrivilegeEscalation", False), ("readOnlyRootFilesystem", True)):
        if own.get(key) is not wanted:
            yield Fault((*place, key), _yaml(own.get(key, MISSING)), _yaml(wanted))
    if merged.get("runAsNonRoot") is not True:
        yield Fault(
            (*place, "runAsNonRoot"),
            _yaml(merged.get("runAsNonRoot", MISSING)),
            "true, here or in the pod's securityContext",
        )
    if not merged.get("runAsUser"):
        yield Fault(
            (*place, "runAsUser"),
            _yaml(merged.get("runAsUser", MISSING)),
            "a user that is not root, here or in the pod's securityContext",
            "The image's user is 1000.",
        )
    dropped = at(own, "capabilities", "drop")
    if dropped is MISSING or "ALL" not in dropped:
        yield Fault((*place, "capabilities", "drop"), _yaml(dropped), "[ALL]")
    if own.get("privileged"):
        yield Fault((*place, "privileged"), "true", "false")


def _reference_faults(
    container: Mapping[str, Any], place: Place, volumes: Mapping[str, Any], config_maps: ConfigMaps
) -> Iterator[Fault]:
    """Volumes that the pod has not, and config maps that are in none of the files."""
    for index, mount in enumerate(container.get("volumeMounts", ())):
        if mount["name"] not in volumes:
            yield Fault(
                (*place, "volumeMounts", index, "name"),
                repr(mount["name"]),
                f"a volume of the pod ({', '.join(volumes) or 'it has none'})",
            )
    for index, source in enumerate(container.get("envFrom", ())):
        reference = source.get("configMapRef", {})
        if reference and not reference.get("optional") and reference["name"] not in config_maps:
            yield Fault(
                (*place, "envFrom", index, "configMapRef", "name"),
                repr(reference["name"]),
                f"a ConfigMap of the files given ({', '.join(config_maps) or 'they have none'})",
                "Give its file too; without it the pod does not start.",
            )


def environment_of(container: Mapping[str, Any], config_maps: ConfigMaps) -> dict[str, str]:
    """The environment variables of a container whose values the manifests tell."""
    environment: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        environment |= config_maps.get(at(source, "configMapRef", "name"), {})
    return environment | {one["name"]: one["value"] for one in container.get("env", ()) if "value" in one}


def volume_at(path: str, container: Mapping[str, Any], spec: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The volume on which a path of a container lies; None where it lies on the container's own disk."""
    volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
    around = [
        mount for mount in container.get("volumeMounts", ()) if PurePosixPath(path).is_relative_to(mount["mountPath"])
    ]
    if not around:
        return None
    return volumes.get(max(around, key=lambda mount: len(mount["mountPath"]))["name"])


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
