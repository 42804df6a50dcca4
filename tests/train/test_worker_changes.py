"""What is told of a run's workers: failures, changes of their number with the cause, waits for room."""

import pytest

from rafce_ray.config import RunConfig
from rafce_ray.run.folder import RunFolder
from rafce_ray.train.worker import WorkerChanges, describe_failures, root_cause


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


def told(folder: RunFolder) -> list[tuple[str, str]]:
    return [(event["event"], event["message"]) for event in folder.events()]


def test_a_loss_and_a_growth_are_told_with_their_causes(folder):
    changes = WorkerChanges(folder, RunConfig(num_workers=(1, 4), max_failures=3))
    changes.started(2)
    assert folder.events() == []
    folder.write_progress({"epoch": 3, "step": 5, "steps": 9})
    changes.failed("worker 0 lost the connection to another worker")
    changes.started(1, lost=[1])
    changes.started(4)
    changes.failed("worker 2 died")
    changes.started(3)
    at = "in epoch 3, after step 5 or later"
    assert told(folder) == [
        (
            "workers_failed",
            "worker 0 lost the connection to another worker: starting the workers again (failure 1 of at most 3)",
        ),
        ("resized", f"going on with 1 worker instead of 2 {at}: worker 1 lost with its machine"),
        ("resized", f"going on with 4 workers instead of 1 {at}: the cluster has room for more"),
        ("workers_failed", "worker 2 died: starting the workers again (failure 2 of at most 3)"),
        ("resized", f"going on with 3 workers instead of 4 {at}: worker 2 died"),
    ]
    numbers = [(event["before"], event["num_workers"]) for event in folder.events() if event["event"] == "resized"]
    assert numbers == [(2, 1), (1, 4), (4, 3)]


@pytest.mark.parametrize("progress", [None, {"epoch": 2, "step": 7, "steps": 9}])
def test_epochs_that_were_too_short_to_show_progress_count_as_reached(progress, folder):
    changes = WorkerChanges(folder, RunConfig(num_workers=(1, 4)))
    changes.started(2)
    folder.write_metrics([{"epoch": 1}, {"epoch": 2}])
    if progress is not None:
        folder.write_progress(progress)
    changes.started(1, lost=[0])
    (event,) = folder.events()
    assert (event["epoch"], event["step"]) == (3, 0)
    assert "instead of 2 in epoch 3, after step 0 or later: worker 0 lost" in event["message"]


def test_workers_that_are_replaced_are_no_change_of_their_number(folder):
    changes = WorkerChanges(folder, RunConfig(num_workers=2))
    changes.started(2)
    changes.failed("worker 0 died")
    changes.started(2)
    changes.failed("a machine is taken away", counted=False)
    changes.started(2)
    assert told(folder) == [
        ("workers_failed", "worker 0 died: starting the workers again (failure 1 of at most 3)"),
        ("workers_failed", "a machine is taken away: starting the workers again"),
    ]


def test_a_wait_for_room_is_told_once_with_the_remedy(folder):
    moments = iter([100.0, 129.0, 131.0, 500.0, 600.0])
    changes = WorkerChanges(folder, RunConfig(num_workers=(2, 4)), clock=lambda: next(moments))
    for _ in range(4):
        changes.waiting()
    [(kind, message)] = told(folder)
    assert kind == "waiting_for_room"
    assert message.startswith(
        "no worker could be started for 31 s: waiting until the cluster has room for at least 2 workers"
    )
    assert "lower run.num_workers" in message
    changes.started(2)
    changes.waiting()
    assert len(told(folder)) == 1


class ActorDiedError(Exception):
    """Ray's, by name."""


class ActorUnavailableError(Exception):
    """Ray's, by name."""


class HealthCheckFailed(Exception):
    """Ray Train's wrapping of what a look at a worker found."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("A worker health check failed.")
        self.health_check_failure = cause


def test_those_that_are_gone_are_named_and_not_those_whom_they_took_along():
    dead, silent = HealthCheckFailed(ActorDiedError("died")), HealthCheckFailed(ActorUnavailableError("for now"))
    cut_off = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:545] Connection closed by peer")
    assert describe_failures({0: cut_off, 1: dead}) == "worker 1 died"
    assert describe_failures({0: dead, 1: cut_off, 2: dead}) == "workers 0 and 2 died"
    assert describe_failures({0: silent, 1: dead, 2: cut_off}) == "worker 1 died, worker 0 gave no answer"
    assert describe_failures({0: cut_off, 3: cut_off}) == "workers 0 and 3 lost the connection to another worker"
    error = ValueError("first line\nwhat it is about\n")
    assert describe_failures({0: cut_off, 1: error}) == "worker 1 failed: ValueError: what it is about"
    assert root_cause(HealthCheckFailed(error)) == "ValueError: what it is about"
