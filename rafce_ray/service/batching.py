"""Which requests are admitted, and how their faces go through the model in batches.

One thread takes all faces that wait, without a timer. While a batch runs the next one gathers, so batches grow with the
load and a single request never waits for others.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from rafce_ray.base.errors import RafceError
from rafce_ray.bundle.model import Predictor
from rafce_ray.metrics.calibration import Probabilities, calibrated
from rafce_ray.service.meter import Meter
from rafce_ray.service.problems import Problem


class NotFiniteError(RafceError):
    """The model gave NaN or infinity for a face: there is no answer to give."""


@dataclass(frozen=True)
class Batched:
    """Probabilities of one request's faces, and the seconds that they waited and that their batch took."""

    probabilities: Probabilities
    queue_s: float
    inference_s: float


@dataclass(frozen=True)
class _Waiting:
    predictor: Predictor
    faces: NDArray[np.uint8]
    future: asyncio.Future[Batched]
    since: float = field(default_factory=time.monotonic)


_Outcome = tuple[_Waiting, Batched | Exception]


class Batcher:
    """The one inference thread of a process; requests of different models never share a batch.

    It holds as many requests as it is given: admission bounds them.
    """

    def __init__(self, max_batch_faces: int, meter: Meter | None = None) -> None:
        self._max_batch_faces = max_batch_faces
        self._meter = meter or Meter()
        self._queue: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._running_since: float | None = None
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    async def probabilities(self, predictor: Predictor, faces: NDArray[np.uint8]) -> Batched:
        """Calibrated probabilities, 0-1, of RGB faces (B, S, S, 3) uint8; B may exceed a batch.

        A call that is cancelled before its batch begins costs nothing. NotFiniteError where an output of a face is not
        finite; RafceError where the thread was closed.
        """
        if not self._thread.is_alive():
            raise RafceError("the inference thread has ended: start the service again.")
        size = self._max_batch_faces
        if len(faces) <= size:
            return await self._put(predictor, faces)
        # Batch by batch, so that a large request that is cancelled costs one batch and not all of them.
        waiting = [self._put(predictor, faces[start : start + size]) for start in range(0, len(faces), size)]
        parts = await asyncio.gather(*waiting)
        # The request waited for its first batch, and took until its last one was done.
        queue_s, total_s = parts[0].queue_s, max(part.queue_s + part.inference_s for part in parts)
        emotion = np.concatenate([part.probabilities.emotion for part in parts])
        action_units = np.concatenate([part.probabilities.action_units for part in parts])
        return Batched(Probabilities(emotion, action_units), queue_s, total_s - queue_s)

    def _put(self, predictor: Predictor, faces: NDArray[np.uint8]) -> asyncio.Future[Batched]:
        future: asyncio.Future[Batched] = asyncio.get_running_loop().create_future()
        self._queue.put(_Waiting(predictor, faces, future))
        return future

    def busy_s(self) -> float:
        """Seconds for which the batch that runs now has been running; 0 where none runs. A hung engine shows here."""
        since = self._running_since
        return 0.0 if since is None else time.monotonic() - since

    def is_alive(self) -> bool:
        """Whether the thread still takes batches."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Let the batches that wait be done and end the thread; returns when it has ended, or after 10 s."""
        self._queue.put(None)
        self._thread.join(10)

    def _work(self) -> None:
        following: _Waiting | None = None
        while True:
            first = following or self._queue.get()
            if first is None:
                break
            batch, following, closing = self._gather(first)
            if batch:
                self._meter.batch_faces.observe(sum(len(waiting.faces) for waiting in batch))
                self._running_since = time.monotonic()
                outcomes = _run(batch)
                self._running_since = None
                _deliver(outcomes)
            if closing:
                break
        left = [] if following is None else [following]
        while not self._queue.empty():
            left += filter(None, [self._queue.get()])
        _deliver([(waiting, RafceError("the service is shutting down.")) for waiting in left])

    def _gather(self, first: _Waiting) -> tuple[list[_Waiting], _Waiting | None, bool]:
        """The batch that begins with ``first``, the request that no longer fits, and whether the thread shall end."""
        batch = [] if first.future.cancelled() else [first]
        num_faces = len(first.faces) if batch else 0
        while not self._queue.empty():
            waiting = self._queue.get()
            if waiting is None:
                return batch, None, True
            if waiting.future.cancelled():
                continue
            if batch and (
                waiting.predictor is not batch[0].predictor or num_faces + len(waiting.faces) > self._max_batch_faces
            ):
                return batch, waiting, False
            batch.append(waiting)
            num_faces += len(waiting.faces)
        return batch, None, False


def _run(batch: Sequence[_Waiting]) -> list[_Outcome]:
    """The outcome of each request of a batch. An exception of the engine is one, and ends no thread."""
    started = time.monotonic()
    predictor = batch[0].predictor
    try:
        faces = batch[0].faces if len(batch) == 1 else np.concatenate([waiting.faces for waiting in batch])
        outputs = predictor.outputs(faces)
        found = calibrated(outputs, predictor.bundle.calibration)
    except Exception as error:
        return [(waiting, error) for waiting in batch]
    finite = np.asarray(np.isfinite(np.hstack([outputs.emotion, outputs.action_units])).all(axis=1))
    took = time.monotonic() - started
    outcomes: list[_Outcome] = []
    stop = 0
    for waiting in batch:
        rows = slice(stop, stop := stop + len(waiting.faces))
        if finite[rows].all():
            own = Probabilities(found.emotion[rows], found.action_units[rows])
            outcomes.append((waiting, Batched(own, started - waiting.since, took)))
        else:
            outcomes.append((waiting, NotFiniteError("the model gave values that are not finite for a face.")))
    return outcomes


def _deliver(outcomes: Sequence[_Outcome]) -> None:
    """One wake-up of each event loop that waits (a process has one; tests have several)."""
    for loop in {waiting.future.get_loop() for waiting, _ in outcomes}:
        own = [outcome for outcome in outcomes if outcome[0].future.get_loop() is loop]
        # A loop that was closed meanwhile has nobody left who waits.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_resolve, own)


def _resolve(outcomes: Sequence[_Outcome]) -> None:
    for waiting, outcome in outcomes:
        if waiting.future.done():
            continue
        if isinstance(outcome, Exception):
            waiting.future.set_exception(outcome)
        else:
            waiting.future.set_result(outcome)


RETRY_AFTER_S = 1


class Admission:
    """The places of one process; ``with admission.place(num_bytes) as place`` takes one or raises Problem ``busy``.

    One event loop uses it, so it needs no lock. A place is given back however its block ends: answered, failed or
    cancelled because the client went away.
    """

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self.num_requests = 0
        self.num_bytes = 0
        self.num_refused = 0

    def place(self, num_bytes: int = 0) -> Place:
        """A place for a request whose body has ``num_bytes`` as far as is known; more are added as they come.

        Problem ``busy`` (429) with Retry-After where there is no room.
        """
        if self.num_requests >= self.max_requests:
            raise self._refusal(f"All {self.max_requests:,} places are taken.")
        place = Place(self)
        place.hold(num_bytes)
        self.num_requests += 1
        return place

    def _refusal(self, detail: str) -> Problem:
        self.num_refused += 1
        return Problem("busy", detail, headers={"retry-after": str(RETRY_AFTER_S)})


class Place:
    """One request's place: it holds ``num_bytes`` until its ``with`` block ends."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.num_bytes = 0

    def hold(self, num_bytes: int) -> None:
        """Hold ``num_bytes`` in all, if that is more than now; Problem ``busy`` where there is no room."""
        more = num_bytes - self.num_bytes
        if more <= 0:
            return
        admission = self._admission
        if admission.num_bytes + more > admission.max_bytes:
            detail = f"Its {num_bytes:,} bytes would exceed the {admission.max_bytes:,} that are held at once."
            raise admission._refusal(detail)
        admission.num_bytes += more
        self.num_bytes = num_bytes

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self._admission.num_requests -= 1
        self._admission.num_bytes -= self.num_bytes
