"""What a trial gets of a cluster and how many run at a time; what can never fit is refused with the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rafce_ray.base.errors import UsageError
from rafce_ray.config import RunConfig

NESTED_MEMORY_BYTES = 2**20
"""What Tune itself reserves for a trial of several workers, whose CPUs Ray Train reserves: Tune wants something to be reserved."""


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of one machine of the cluster."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Shares:
    """``cpus`` and ``gpus`` of each of a trial's ``workers``; ``at_once``: trials at a time; ``fitting``: how many the cluster could hold."""

    workers: int
    cpus: float
    gpus: float
    at_once: int
    fitting: int

    @property
    def reserved(self) -> dict[str, float]:
        """What Tune reserves for one trial."""
        if self.workers > 1:
            return {"cpu": 0, "memory": NESTED_MEMORY_BYTES}
        return {"cpu": self.cpus} | ({"gpu": self.gpus} if self.gpus else {})

    @property
    def shown(self) -> str:
        """``2 at a time, each 1 worker with 1 CPU and 0.5 GPU``."""
        gpu = f" and {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.at_once} at a time, each {self.workers} worker(s) with {self.cpus:g} CPU{gpu}"


def share_out(
    run: RunConfig, nodes: Sequence[Node], *, concurrent: int | None, gpus_per_worker: float | None
) -> Shares:
    """The shares of trials that are all alike.

    ``concurrent``: trials at a time; None: as many as fit. ``gpus_per_worker``: None: where there are GPUs and ``run.use_gpu`` is not
    false a whole one, or a fraction where more one-worker trials at a time than GPUs are asked for.

    Raises:
        UsageError: one trial, or ``concurrent`` of them, can never run on this cluster, or ``run.use_gpu`` contradicts ``gpus_per_worker``.
    """
    workers, cpus = run.most_workers, float(run.cpus_per_worker or 1)
    total = Node(sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
    if gpus_per_worker is not None and run.use_gpu not in (None, gpus_per_worker > 0):
        raise UsageError(
            f"base.run.use_gpu={str(run.use_gpu).lower()} and resources.gpus_per_worker={gpus_per_worker:g} contradict each other. "
            "Leave one of them out."
        )
    gpus = gpus_per_worker or 0.0
    if gpus_per_worker is None and (run.use_gpu if run.use_gpu is not None else total.gpus > 0):
        crowded = workers == 1 and concurrent is not None and concurrent > total.gpus > 0
        gpus = 1 / math.ceil(concurrent / total.gpus) if crowded and concurrent else 1.0
    slots = sum(_slots(node, cpus, gpus) for node in nodes)
    fitting = slots // workers
    wanted = f"{workers} worker(s) x {cpus:g} CPU" + (f" + {gpus:g} GPU" if gpus else "")
    has = f"the cluster has {total.cpus:g} CPUs and {total.gpus:g} GPUs on {len(nodes)} machine(s), which hold {slots} such worker(s)"
    if fitting < 1:
        raise UsageError(
            f"a trial wants {wanted}; {has}. Lower resources.workers, resources.cpus_per_worker or resources.gpus_per_worker, "
            "or set base.run.use_gpu=false."
        )
    if concurrent is not None and concurrent > fitting:
        raise UsageError(
            f"{concurrent} trials at a time x {wanted} = {concurrent * workers} workers; {has}. Lower the number of trials at a time "
            "(resources.concurrent, --concurrent) or what each of them gets."
        )
    return Shares(workers, cpus, gpus, concurrent or fitting, fitting)


def _slots(node: Node, cpus: float, gpus: float) -> int:
    """Workers that one machine can hold. A worker never spans two GPUs' fractions, so each GPU is counted for itself."""
    by_cpu = math.floor(node.cpus / cpus + 1e-9)
    if not gpus:
        return by_cpu
    by_gpu = math.floor(node.gpus / gpus + 1e-9) if gpus >= 1 else math.floor(node.gpus) * math.floor(1 / gpus + 1e-9)
    return min(by_cpu, by_gpu)
