"""Ray Train's private parts are where rafce_ray/train/ray_private.py looks for them, and do what it needs of them."""

import importlib
import inspect
import sys
from types import SimpleNamespace

import pytest
from ray.train import WorkerGroupError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import controller
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RestartingState,
    RunningState,
    SchedulingState,
)
from ray.train.v2._internal.execution.worker_group import ActorMetadata, worker_group

from rafce_ray.base.errors import RafceError
from rafce_ray.train import ray_private


class Calls(ray_private.GroupCallback):
    """Keeps what it was called with."""

    def __init__(self) -> None:
        self.kept: list[object] = []

    def after_failure(self, error: BaseException) -> None:
        self.kept.append(error)

    def while_without_workers(self) -> None:
        self.kept.append("without workers")

    def after_start(self, machines: dict[int, str]) -> None:
        self.kept.append(machines)


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(ControllerCallback, "after_controller_state_update"), (WorkerGroupCallback, "after_worker_group_start")],
)
def test_ray_calls_the_hooks_under_these_names_with_these_arguments(owner, name):
    assert parameters(getattr(owner, name)) == parameters(getattr(ray_private.GroupCallback, name))
    caller = inspect.getsource(controller) + inspect.getsource(worker_group)
    assert f'"{name}"' in caller or f".{name}(" in caller


def test_a_failure_is_passed_on_once_and_every_step_without_workers():
    callback, error = Calls(), WorkerGroupError("lost", {0: RuntimeError("died")})
    assert error.worker_failures[0].args == ("died",)
    restarting = RestartingState(training_failed_error=error)
    for before, now in (
        (InitializingState(), SchedulingState(scaling_decision=None)),
        (RunningState(), restarting),
        (restarting, restarting),
        (restarting, RunningState()),
        (RunningState(), ReschedulingState(training_failed_error=error)),
    ):
        callback.after_controller_state_update(before, now)
    without = "without workers"
    assert callback.kept == [without, error, without, without, without]


def test_machines_of_a_group_are_passed_on_by_rank():
    callback = Calls()
    nodes = [ActorMetadata(hostname="h", node_id=node, node_ip="i", pid=1, accelerator_ids={}) for node in "ab"]
    group = SimpleNamespace(get_workers=lambda: [SimpleNamespace(metadata=node) for node in nodes])
    callback.after_worker_group_start(group)
    assert callback.kept == [{0: "a", 1: "b"}]


@pytest.mark.parametrize("moved", ["module", "hook"])
def test_a_part_that_moved_is_reported_in_one_line_with_the_remedy(moved, monkeypatch):
    if moved == "module":
        monkeypatch.setitem(sys.modules, "ray.train.v2._internal.execution.callback", None)
    else:
        monkeypatch.delattr(WorkerGroupCallback, "after_worker_group_start")
    monkeypatch.delitem(sys.modules, ray_private.__name__)
    with pytest.raises(RafceError, match=r"Ray .* has moved a private part of Ray Train .*pip install") as caught:
        importlib.import_module(ray_private.__name__)
    assert "\n" not in str(caught.value)
