"""Records in a run's events how many workers train it, and why their number changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from rafce_ray.config import RunConfig
from rafce_ray.run.folder import RunFolder

WAITING_TOLD_AFTER_S = 30.0
"""Seconds without room for the workers before that is reported."""


class WorkerChanges:
    """Records each failure of a run's workers, each change of their number with its cause, and a wait for room.

    ``clock``: in seconds.
    """

    def __init__(self, folder: RunFolder, run: RunConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._run, self._clock = folder, run, clock
        self._num_workers: int | None = None
        self._failures = 0
        self._cause: str | None = None
        self._waiting_since: float | None = None
        self._waiting_told = False

    def failed(self, why: str, *, counted: bool = True) -> None:
        """Workers failed, and all are restarted; ``counted``: against ``run.max_failures``."""
        self._cause = why
        self._failures += counted
        so_many = f" (failure {self._failures} of at most {self._run.max_failures})" if counted else ""
        self._folder.add_event(
            "workers_failed", message=f"{why}: starting the workers again{so_many}", failures=self._failures
        )

    def waiting(self) -> None:
        """The workers have not started yet; call this repeatedly while that lasts."""
        now = self._clock()
        if self._waiting_since is None:
            self._waiting_since = now
        if self._waiting_told or now - self._waiting_since < WAITING_TOLD_AFTER_S:
            return
        self._waiting_told = True
        least, many = self._run.least_workers, self._run.least_workers > 1
        message = (
            f"no worker could be started for {now - self._waiting_since:.0f} s: waiting until the cluster has room for "
            f"{'at least ' if self._run.is_elastic else ''}{least} worker{'s' if many else ''}"
        )
        if many:
            message += ". To go on with fewer, stop this and give the command again with a lower run.num_workers"
        self._folder.add_event("waiting_for_room", message=message, num_workers=least)

    def started(self, num_workers: int, lost: Sequence[int] = ()) -> None:
        """``num_workers`` workers begin; the machines of the earlier ranks ``lost`` are gone."""
        before, cause = self._num_workers, self._cause
        self._num_workers, self._cause = num_workers, None
        self._waiting_since, self._waiting_told = None, False
        if before is None or before == num_workers:
            return
        if num_workers > before:
            cause = "the cluster has room for more"
        elif lost:
            cause = f"{_named(lost)} lost with {'its machine' if len(lost) == 1 else 'their machines'}"
        elif cause is None:
            cause = "the cluster has room for fewer"
        # An epoch of less than a second writes no progress of its own.
        progress = self._folder.progress()
        shown = (progress.get("epoch", 1), progress.get("step", 0))
        epoch, step = max((len(self._folder.metrics()) + 1, 0), shown)
        self._folder.add_event(
            "resized",
            message=f"going on with {num_workers} worker{'s' if num_workers > 1 else ''} instead of {before} in epoch "
            f"{epoch}, after step {step} or later: {cause}",
            num_workers=num_workers,
            before=before,
            cause=cause,
            epoch=epoch,
            step=step,
        )


def describe_failures(errors: Mapping[int, BaseException]) -> str:
    """The failures of a group's workers, by rank, in one line.

    A lost worker makes the others fail too: then only the lost ones are named.
    """
    dead, silent, cut_off = [], [], []
    for rank, error in sorted(errors.items()):
        kind = type(_root_of(error)).__name__
        if kind == "ActorDiedError":
            dead.append(rank)
        elif kind in ("ActorUnavailableError", "WorkerHealthCheckTimeoutError"):
            silent.append(rank)
        elif any(name in str(error) for name in ("gloo", "NCCL")):
            cut_off.append(rank)
    gone = [f"{_named(ranks)} {what}" for ranks, what in ((dead, "died"), (silent, "gave no answer")) if ranks]
    if gone:
        return ", ".join(gone)
    own = next((rank for rank in sorted(errors) if rank not in cut_off), None)
    if own is None:
        return f"{_named(cut_off)} lost the connection to another worker"
    return f"{_named([own])} failed: {root_cause(errors[own])}"


def _named(ranks: Sequence[int]) -> str:
    return f"worker{'s' if len(ranks) > 1 else ''} {' and '.join(map(str, ranks))}"


def _root_of(error: BaseException) -> BaseException:
    """The innermost error: Ray wraps a worker's several times."""
    failures = getattr(error, "worker_failures", None) or {}
    inner: BaseException = next(iter(failures.values()), error)
    while (
        cause := getattr(inner, "cause", None) or getattr(inner, "health_check_failure", None) or inner.__cause__
    ) is not None:
        inner = cause
    return inner


def root_cause(error: BaseException) -> str:
    """The innermost error's type and last line."""
    inner = _root_of(error)
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[-1] if lines else 'no message'}"
