"""What a run is (``Job``) and how the epoch loop meets the outside (``Session``): Ray's workers implement it, and one process does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.config import Config, build_config


@dataclass(frozen=True)
class Job:
    """All that a worker needs: the configuration, the decoded store, the resolved taxonomy, the run folder, where it came from."""

    config: Config
    store: str
    taxonomy: Taxonomy
    run_dir: str
    provenance: dict[str, Any]

    def to_plain(self) -> dict[str, Any]:
        """As plain JSON values: what Ray Train carries to the workers and shows on its dashboard."""
        return {
            "config": self.config.model_dump(mode="json"),
            "store": self.store,
            "taxonomy": asdict(self.taxonomy),
            "run_dir": self.run_dir,
            "provenance": self.provenance,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Job:
        """The job that :meth:`to_plain` wrote."""
        taxonomy = plain["taxonomy"]
        components = tuple(None if pair is None else (pair[0], pair[1]) for pair in taxonomy["components"])
        return cls(
            config=build_config(plain["config"]),
            store=plain["store"],
            taxonomy=Taxonomy(tuple(taxonomy["emotions"]), components, tuple(taxonomy["action_units"])),
            run_dir=plain["run_dir"],
            provenance=plain["provenance"],
        )


class Session(Protocol):
    """One worker's view of the group that trains together."""

    rank: int
    num_workers: int
    device: torch.device

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose gradients are averaged over workers."""

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over workers, on the CPU; every worker must call it."""

    def broadcast(self, value: str | None) -> str | None:
        """Rank 0's value; every worker must call it."""

    def share_buffers(self, module: nn.Module) -> None:
        """Give every worker rank 0's buffers (batch-norm statistics), in place."""

    def alive(self) -> None:
        """Called after every step: a worker that stops calling it counts as hung."""

    def report(self, record: dict[str, Any]) -> None:
        """One finished epoch; plain floats, ints, strings and None only."""


class LocalSession:
    """The loop in this process alone: tests, benchmarks, machines without Ray."""

    rank = 0
    num_workers = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.records: list[dict[str, Any]] = []

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module itself."""
        return module

    def sum(self, values: Tensor) -> Tensor:
        """The values themselves, on the CPU."""
        return values.detach().cpu()

    def broadcast(self, value: str | None) -> str | None:
        """The value itself."""
        return value

    def share_buffers(self, module: nn.Module) -> None:
        """Nothing to share."""

    def alive(self) -> None:
        """Nobody watches."""

    def report(self, record: dict[str, Any]) -> None:
        """Keep the record in ``records``."""
        self.records.append(record)
