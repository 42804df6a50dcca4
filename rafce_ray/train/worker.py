"""What runs inside Ray processes: the epoch loop behind Ray Train, its metrics, and changes of its workers."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import ray
import ray.train
import ray.train.torch
import ray.tune
import ray.util
import torch
import torch.distributed as dist
from ray.util.metrics import Counter, Gauge
from torch import Tensor, nn

from rafce_ray.base.errors import RafceError
from rafce_ray.config import RunConfig
from rafce_ray.doctor.rules import report_findings
from rafce_ray.monitoring.metrics import (
    COMMAND,
    INVALID_CHECKPOINTS,
    LAST_STEP,
    MAX_EPOCHS,
    RESTARTS,
    Metric,
    Sample,
    epoch_samples,
)
from rafce_ray.run.folder import RunFolder
from rafce_ray.run.loop import fit
from rafce_ray.run.state import Job, LocalSession
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import check_sampled, conclude, read_plan
from rafce_ray.train.ray_private import GroupCallback

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


REFRESH_S = 1.0
"""Below Ray's shortest export interval."""

_counted: dict[tuple[Metric, str], int] = {}
"""How far this process has counted each metric of each run."""


class Publisher:
    """Shows gauges until :meth:`stop`."""

    def __init__(self) -> None:
        self._values: dict[tuple[Metric, tuple[str, ...]], float] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        threading.Thread(target=self._refresh, name="telemetry", daemon=True).start()

    def show(self, samples: Iterable[Sample]) -> None:
        """Set gauges, from now on every second; one that was shown before gets its new value."""
        new = {(metric, tags): value for metric, tags, value in samples}
        with self._lock:
            self._values |= new
            _set(new)

    def stop(self) -> None:
        """Show nothing more."""
        self._stopped.set()

    def _refresh(self) -> None:
        while not self._stopped.wait(REFRESH_S):
            with self._lock:
                _set(self._values)


def _set(values: Mapping[tuple[Metric, tuple[str, ...]], float]) -> None:
    for (metric, tags), value in values.items():
        _instrument(Gauge, metric).set(value, tags=dict(zip(metric.tags, tags, strict=True)))


class RunTelemetry:
    """What rank 0 of a run, or of a trial, shows of it while it trains."""

    def __init__(self, job: Job) -> None:
        self._folder = RunFolder(job.run_dir)
        self._run = self._folder.label
        self._last_step = time.time()
        self._publisher = Publisher()
        self._publisher.show([Sample(MAX_EPOCHS, (self._run,), float(job.config.optim.epochs)), self._step()])
        # The loop puts this start on record when it begins.
        self._count(RESTARTS, "started")
        self._count(INVALID_CHECKPOINTS, "invalid_checkpoint")

    def step_done(self) -> None:
        """A step is done."""
        now = time.time()
        if now - self._last_step >= REFRESH_S:
            self._last_step = now
            self._publisher.show([self._step()])

    def epoch_done(self, record: Mapping[str, float | None]) -> None:
        """An epoch is done; ``record`` as the loop reports it."""
        self._publisher.show(epoch_samples(self._run, record))
        self._count(INVALID_CHECKPOINTS, "invalid_checkpoint")

    def stop(self) -> None:
        """The run has ended in this process."""
        self._count(INVALID_CHECKPOINTS, "invalid_checkpoint")
        self._publisher.stop()

    def _step(self) -> Sample:
        return Sample(LAST_STEP, (self._run,), self._last_step)

    def _count(self, metric: Metric, event: str) -> None:
        """Raise this process's counter to the number of these events on record.

        After a restart the new process counts all again: the true count is the largest over processes, and a process
        that dies before Ray exports loses nothing.
        """
        # What cannot be read now is counted at the next look.
        with suppress(OSError):
            total = sum(one["event"] == event for one in self._folder.events())
            missing = total - _counted.get((metric, self._run), 0)
            if missing > 0:
                _instrument(Counter, metric).inc(missing, tags=dict(zip(metric.tags, (self._run,), strict=True)))
                _counted[metric, self._run] = total


@contextmanager
def command_shown(folder: RunFolder) -> Iterator[None]:
    """Show, from the command's own process, that it waits for a run while the block lasts."""
    publisher = Publisher()
    publisher.show([Sample(COMMAND, (folder.label,), 1.0)])
    try:
        yield
    finally:
        publisher.stop()


@cache
def _instrument(kind: type[Counter] | type[Gauge], metric: Metric) -> Any:
    return kind(metric.name, metric.description, metric.tags)


HUNG_EXIT_CODE = 75
STARTING = 4
"""Times ``run.hang_timeout_s`` that a worker has for its first step."""


def train_worker(plain_job: dict[str, Any]) -> dict[str, Any] | None:
    """Ray Train's ``train_loop_per_worker``; rank 0 returns the run's result.

    An error that the user must fix is returned (``error``, ``exit_code``): Ray would retry a raised one in vain.
    """
    job = Job.from_plain(plain_job)
    session = TrainSession(job)
    try:
        return fit(job, session, after_epoch=report_findings)
    except RafceError as error:
        if error.may_pass:
            # Ray starts the group again, which goes on from the newest checkpoint.
            raise
        return {"error": str(error), "exit_code": error.exit_code}
    finally:
        session.stop_watching()


class TrainSession:
    """A Ray Train worker's :class:`rafce_ray.run.state.Session`. It ends its own process when no step ends in time."""

    def __init__(self, job: Job) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.num_workers: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._watchdog = Watchdog(job, self.rank)
        group = ray.util.get_current_placement_group()
        if self.rank == 0 and group is not None:
            # To be freed when the trainer's controller is killed with its trial.
            RunFolder(job.run_dir).add_event("placed", placement_group=group.id.hex())
        self._telemetry = RunTelemetry(job) if self.rank == 0 else None

    def wrap(self, module: nn.Module) -> nn.Module:
        """DistributedDataParallel where there are several workers; on GPUs batch norms then share their statistics."""
        if self.num_workers > 1 and self.device.type == "cuda":
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        wrapped: nn.Module = ray.train.torch.prepare_model(
            module,
            move_to_device=False,
            parallel_strategy_kwargs={"gradient_as_bucket_view": True} if self.num_workers > 1 else None,
        )
        return wrapped

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over workers of ``values`` (K,), or of another shape, with their dtype, on the CPU."""
        total = values.detach().to(self.device, copy=True)
        if self.num_workers > 1:
            dist.all_reduce(total)
        return total.cpu()

    def broadcast(self, value: str | None) -> str | None:
        """Rank 0's value."""
        if self.num_workers == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def share_buffers(self, module: nn.Module) -> None:
        """Give every worker rank 0's buffers."""
        if self.num_workers > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def alive(self) -> None:
        """A step is done."""
        self._watchdog.beat()
        if self._telemetry is not None:
            self._telemetry.step_done()

    def report(self, record: dict[str, Any]) -> None:
        """Report to monitoring and to Ray Train, which does not keep the checkpoint (see docs/design.md)."""
        if self._telemetry is not None:
            self._telemetry.epoch_done(record)
        ray.train.report(record)

    def stop_watching(self) -> None:
        """The loop has ended: silence no longer means that the worker hangs."""
        self._watchdog.stop()
        if self._telemetry is not None:
            self._telemetry.stop()


class ChangesCallback(GroupCallback):
    """Passes on to :class:`WorkerChanges` what Ray Train's controller does with a run's workers."""

    def __init__(self, job: Job) -> None:
        self._changes = WorkerChanges(RunFolder(job.run_dir), job.config.run)
        self._machines: dict[int, str] = {}

    def after_failure(self, error: BaseException) -> None:
        """Record why the workers are started again."""
        with _recorded_if_possible():
            if isinstance(error, ray.train.PreemptionError):
                self._changes.failed("a machine is taken away", counted=False)
            elif isinstance(error, ray.train.WorkerGroupError):
                self._changes.failed(describe_failures(error.worker_failures))
            else:
                self._changes.failed(root_cause(error), counted=False)

    def while_without_workers(self) -> None:
        """Record a wait for room that takes long."""
        with _recorded_if_possible():
            self._changes.waiting()

    def after_start(self, machines: dict[int, str]) -> None:
        """Record a change of the number of workers. They have not begun, so that nobody else writes events."""
        with _recorded_if_possible():
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            lost = [rank for rank, machine in self._machines.items() if machine not in alive]
            self._machines = machines
            self._changes.started(len(machines), lost)


@contextmanager
def _recorded_if_possible() -> Iterator[None]:
    """Print that the storage cannot be written now, to Ray's log: Ray would end a run whose callback fails."""
    try:
        yield
    except OSError as error:
        print(f"a change of the workers could not be put on record: {error}", file=sys.stderr, flush=True)


def trial_worker(plain: dict[str, Any], study: str, metric: str) -> dict[str, Any]:
    """Ray Tune's function: trains the trial that ``plain["trial"]`` names in this process; returns how it ended.

    ``metric``: the study's. An error that the user must fix is returned: Ray would retry a raised one in vain.
    Where a trial's folder has a checkpoint, it goes on from there.
    """
    folder = StudyFolder(study)
    session = None
    try:
        job = read_trial_job(plain, folder)
        session = TrialSession(job)
        result = fit(job, session, after_epoch=report_findings)
    except RafceError as error:
        if error.may_pass:
            raise
        conclude(folder.trial(str(plain["trial"])), metric, "failed", str(error))
        return {"status": "failed"}
    finally:
        if session is not None:
            session.stop_watching()
    return {"status": "failed" if result is None else result["status"]}


def read_trial_job(plain: dict[str, Any], study: StudyFolder) -> Job:
    """The job of the trial that Ray Tune's configuration names.

    Raises:
        RafceError: what its folder would train is not what was sampled.
    """
    name = str(plain["trial"])
    found = read_plan(study.trial(name))
    if found is None or found[0].config_hash != plain["config_hash"]:
        raise RafceError(
            f"trial {name}: {study.trial(name).location} does not hold the configuration {plain['config_hash']} that "
            "was sampled. Can every node reach the study's storage?"
        )
    check_sampled(*found)
    return found[1]


class TrialSession(LocalSession):
    """A :class:`rafce_ray.run.state.Session` of one process inside a Ray Tune trial."""

    def __init__(self, job: Job) -> None:
        use_gpu = bool(ray.get_gpu_ids())
        super().__init__("cuda" if use_gpu else "cpu")
        # Processes are reused between trials, which may have other shares of the machine.
        torch.set_num_threads(job.config.run.cpus_per_worker or 1)
        self._watchdog = Watchdog(job, self.rank)
        self._telemetry = RunTelemetry(job)

    def alive(self) -> None:
        """A step is done."""
        self._watchdog.beat()
        self._telemetry.step_done()

    def report(self, record: dict[str, Any]) -> None:
        """Tell Ray Tune and the monitoring."""
        self._telemetry.epoch_done(record)
        ray.tune.report(record)

    def stop_watching(self) -> None:
        """The loop has ended: silence no longer means that the trial hangs."""
        self._watchdog.stop()
        self._telemetry.stop()


class Watchdog:
    """Ends this process when ``run.hang_timeout_s`` pass without a step, so that Ray starts the group again.

    Ray notices processes that do not answer, but a training thread that waits for ever (a stuck disk, a dead lock)
    leaves its process answering.
    """

    def __init__(self, job: Job, rank: int) -> None:
        self._timeout_s = job.config.run.hang_timeout_s
        self._folder, self._rank = RunFolder(job.run_dir), rank
        self._start = time.monotonic()
        self._last_beat: float | None = None
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """A step is done."""
        self._last_beat = time.monotonic()

    def stop(self) -> None:
        """No more steps are to come."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._timeout_s / 4)):
            # Before the first step weights may be fetched and a store copied.
            limit = self._timeout_s * (STARTING if self._last_beat is None else 1)
            if time.monotonic() - (self._last_beat or self._start) < limit:
                continue
            message = (
                f"worker {self._rank} finished no step for {limit:.0f} s: ending it, so that training is started again"
            )
            print(message, file=sys.stderr, flush=True)
            self._folder.add_event("hung_worker", message=message, rank=self._rank)
            os._exit(HUNG_EXIT_CODE)
