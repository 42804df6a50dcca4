"""The private parts of Ray Train that a run uses, each with the reason. Ray may move them in any release.

``tests/train/test_ray_private.py`` fails when it does; with a release other than the tested one, commands warn first.
"""

from __future__ import annotations

from dataclasses import fields

from rafce_ray.train.environment import private_part

with private_part("Ray Train"):
    # Ray's public callback reports errors only: neither the size of a group nor a wait for room.
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
    from ray.train.v2._internal.execution.controller.state import (
        InitializingState,
        ReschedulingState,
        RestartingState,
        SchedulingState,
        TrainControllerState,
    )
    from ray.train.v2._internal.execution.worker_group import ActorMetadata, WorkerGroup

    # A hook under another name would never be called, and nobody would notice.
    for owner, method in (
        (ControllerCallback, "after_controller_state_update"),
        (WorkerGroupCallback, "after_worker_group_start"),
        (WorkerGroup, "get_workers"),
    ):
        if not hasattr(owner, method):
            raise ImportError(f"{owner.__name__} has no {method}")
    if "node_id" not in {field.name for field in fields(ActorMetadata)}:
        raise ImportError("ActorMetadata has no node_id")


class GroupCallback(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """What Ray Train's controller does with the workers of a run, in three calls for a subclass to override."""

    def after_failure(self, error: BaseException) -> None:
        """The workers have failed and will be started again. ``error``: Ray's, of :mod:`ray.train`."""

    def while_without_workers(self) -> None:
        """There is no group of workers: the controller starts one or waits for room. Called again and again."""

    def after_start(self, machines: dict[int, str]) -> None:
        """The workers are there and have not begun. ``machines``: the id of each one's node, by rank."""

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Ray calls this after every step of the controller."""
        if isinstance(current_state, RestartingState) and current_state is not previous_state:
            self.after_failure(current_state.training_failed_error)
        if isinstance(current_state, InitializingState | SchedulingState | RestartingState | ReschedulingState):
            self.while_without_workers()

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Ray calls this when a group of workers is there."""
        self.after_start({rank: worker.metadata.node_id for rank, worker in enumerate(worker_group.get_workers())})
