"""What every cluster of ours must be: closed to all but those who are named, and one that Ray can start on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

from rafce_ray.serve.manifests.documents import MISSING, Fault, Place, at
from rafce_ray.serve.manifests.pods import ConfigMaps, pod_faults, security_faults, volume_at

RUNS_CODE = "Whoever reaches the dashboard or the jobs API runs code on the cluster (CVE-2023-48022)."
OPERATOR = {"app.kubernetes.io/component": "kuberay-operator"}
DASHBOARD = 8265
FOLDERS = ("storage", "base.data.root", "base.data.store_dir", "run.storage", "data.root", "data.store_dir")
"""Settings of a study or a run that name a place all machines must reach."""


def cluster_faults(spec: Mapping[str, Any], place: Place, config_maps: ConfigMaps) -> Iterator[Fault]:
    """What is wrong with a cluster's ``spec``, whichever kind it stands in."""
    ray = version("ray")
    if spec["rayVersion"] != ray:
        yield Fault(
            (*place, "rayVersion"), repr(spec["rayVersion"]), f"{ray!r}, the one this project is built and tested with"
        )
    cpus = at(spec, "headGroupSpec", "rayStartParams", "num-cpus")
    if cpus != "0":
        yield Fault(
            (*place, "headGroupSpec", "rayStartParams", "num-cpus"),
            repr(cpus),
            "'0'",
            "A trial or a replica that takes the head's memory ends the whole cluster.",
        )
    yield from _open_doors(spec, place)
    if spec.get("enableInTreeAutoscaling"):
        own = at(spec, "autoscalerOptions", "securityContext")
        pod = at(spec, "headGroupSpec", "template", "spec", "securityContext")
        here = (*place, "autoscalerOptions", "securityContext")
        yield from security_faults({} if own is MISSING else own, here, {} if pod is MISSING else pod)
    for index, group in enumerate(spec.get("workerGroupSpecs", ())):
        if not group["minReplicas"] <= group.get("replicas", group["minReplicas"]) <= group["maxReplicas"]:
            yield Fault(
                (*place, "workerGroupSpecs", index, "replicas"),
                repr(group.get("replicas", MISSING)),
                f"a number from minReplicas ({group['minReplicas']}) to maxReplicas ({group['maxReplicas']})",
            )
    for template, here in templates(spec, place):
        yield from pod_faults(template["spec"], (*here, "spec"), config_maps)


def templates(spec: Mapping[str, Any], place: Place) -> Iterator[tuple[Mapping[str, Any], Place]]:
    """The pods' templates of a cluster, the head's first, each with its place."""
    yield spec["headGroupSpec"]["template"], (*place, "headGroupSpec", "template")
    for index, group in enumerate(spec.get("workerGroupSpecs", ())):
        yield group["template"], (*place, "workerGroupSpecs", index, "template")


def _open_doors(spec: Mapping[str, Any], place: Place) -> Iterator[Fault]:
    """Ways to the dashboard and the jobs API for those who have no business there."""
    mode = at(spec, "authOptions", "mode")
    if mode != "token":
        yield Fault((*place, "authOptions", "mode"), repr(mode), "'token'", RUNS_CODE)
    policy = spec.get("networkPolicy", {})
    # DenyAll is KubeRay's default, but only where there is a policy.
    mode = policy.get("mode", "DenyAll" if "networkPolicy" in spec else MISSING)
    if mode not in ("DenyAll", "DenyAllIngress"):
        yield Fault((*place, "networkPolicy", "mode"), repr(mode), "'DenyAllIngress' or 'DenyAll'", RUNS_CODE)
    rules = at(policy, "head", "ingressRules")
    for index, rule in enumerate(() if rules is MISSING else rules):
        yield from _rule_faults(rule, (*place, "networkPolicy", "head", "ingressRules", index))
    if rules is MISSING or not any(OPERATOR.items() <= labels.items() for labels in _pods_of(rules)):
        yield Fault(
            (*place, "networkPolicy", "head", "ingressRules"),
            "no rule for the operator",
            f"one from pods labelled {OPERATOR} to port {DASHBOARD}",
            "KubeRay deploys and watches by the dashboard's port, and adds no rule for itself.",
        )
    if at(spec, "headGroupSpec", "enableIngress") is True:
        yield Fault((*place, "headGroupSpec", "enableIngress"), "true", "false", RUNS_CODE)
    kind = at(spec, "headGroupSpec", "serviceType")
    if kind not in (MISSING, "ClusterIP"):
        yield Fault((*place, "headGroupSpec", "serviceType"), repr(kind), "'ClusterIP'", RUNS_CODE)
    kind = at(spec, "headGroupSpec", "headService", "spec", "type")
    if kind not in (MISSING, "ClusterIP"):
        yield Fault((*place, "headGroupSpec", "headService", "spec", "type"), repr(kind), "'ClusterIP'", RUNS_CODE)


def _rule_faults(rule: Mapping[str, Any], place: Place) -> Iterator[Fault]:
    """A rule of the head's that lets in more than pods that are named."""
    if not rule.get("from"):
        yield Fault((*place, "from"), "nothing, which is everybody", "the pods that may come", RUNS_CODE)
    if not rule.get("ports"):
        yield Fault((*place, "ports"), "nothing, which is every port", "the ports to which they may", RUNS_CODE)
    for index, peer in enumerate(rule.get("from", ())):
        block = at(peer, "ipBlock", "cidr")
        if block is not MISSING and str(block).endswith("/0"):
            yield Fault((*place, "from", index, "ipBlock", "cidr"), repr(block), "fewer addresses than all", RUNS_CODE)
        if block is MISSING and not any(_labels(peer, key) for key in ("namespaceSelector", "podSelector")):
            yield Fault((*place, "from", index), "pods of any kind", "a selector with labels", RUNS_CODE)


def _labels(peer: Mapping[str, Any], key: str) -> Any:
    selector = peer.get(key) or {}
    return selector.get("matchLabels") or selector.get("matchExpressions")


def _pods_of(rules: Any) -> Iterator[Mapping[str, str]]:
    for rule in rules:
        for peer in rule.get("from", ()):
            if any(port.get("port") == DASHBOARD for port in rule.get("ports", ())):
                labels = at(peer, "podSelector", "matchLabels")
                yield {} if labels is MISSING else labels


def job_faults(spec: Mapping[str, Any], config_maps: ConfigMaps) -> Iterator[Fault]:
    """What is wrong with a RayJob beside its cluster."""
    if "rayClusterSpec" not in spec:
        return
    place: Place = ("spec", "rayClusterSpec")
    yield from cluster_faults(spec["rayClusterSpec"], place, config_maps)
    if "submitterPodTemplate" in spec:
        here = ("spec", "submitterPodTemplate", "spec")
        yield from pod_faults(spec["submitterPodTemplate"]["spec"], here, config_maps)
    if spec.get("shutdownAfterJobFinishes") is not True:
        yield Fault(
            ("spec", "shutdownAfterJobFinishes"),
            repr(spec.get("shutdownAfterJobFinishes", MISSING)),
            "true",
            "Else the cluster stays, and costs, when the job has ended.",
        )
    try:
        words = shlex.split(spec["entrypoint"])
    except ValueError as error:
        yield Fault(("spec", "entrypoint"), repr(spec["entrypoint"]), f"a command ({error})")
        return
    if "rafce_ray.tune" in words or "rafce_ray.train" in words:
        given = dict(word.split("=", 1) for word in words if "=" in word)
        yield from _place_faults(given, spec["rayClusterSpec"], tune="rafce_ray.tune" in words)


def _place_faults(given: Mapping[str, str], spec: Mapping[str, Any], *, tune: bool) -> Iterator[Fault]:
    """Places of the entrypoint that end with their pod, or are another on every machine."""
    needed = FOLDERS[:3] if tune else FOLDERS[3:]
    for key in needed:
        value = given.get(key)
        if value is None:
            yield Fault(("spec", "entrypoint"), f"no {key}=", f"{key}= and a place that all pods share")
            continue
        if "://" in value:
            continue
        for template, here in templates(spec, ("spec", "rayClusterSpec")):
            pod = template["spec"]
            volume = volume_at(value, pod["containers"][0], pod) if PurePosixPath(value).is_absolute() else None
            if volume is None or "emptyDir" in volume:
                yield Fault(
                    ("spec", "entrypoint"),
                    f"{key}={value}",
                    f"a URI, or a folder on a volume that all pods share, mounted in {'.'.join(map(str, here[2:-1]))}",
                    "What is written elsewhere ends with its pod.",
                )
                break
