"""What outlives a request: the model that answers, its queue, its limits, keys and counts."""

from __future__ import annotations

import asyncio
import io
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image

from rafce_ray.base.errors import RafceError
from rafce_ray.base.hardware import num_cores
from rafce_ray.bundle.canary import probabilities_apart
from rafce_ray.bundle.engines import MAX_DIFFERENCE
from rafce_ray.metrics.calibration import Probabilities, calibrated
from rafce_ray.service.batching import Admission, Batcher
from rafce_ray.service.config import ServiceConfig
from rafce_ray.service.keys import Keys
from rafce_ray.service.live import LiveModel, Served, Source, load_served
from rafce_ray.service.meter import Meter
from rafce_ray.service.predicting import Reader
from rafce_ray.service.problems import Problem

FRESH_S = 1.0
"""Seconds for which a canary's success counts; more frequent checks cost nothing."""

HUNG_S = 60.0
"""Seconds after which a running batch counts as hung; a batch takes less than a tenth of it."""


class Service:
    """A model ready to answer, with all that its requests share; one event loop uses it."""

    def __init__(self, config: ServiceConfig) -> None:
        """Load, verify and warm the model in seconds. RafceError where it may not be served or a file is missing."""
        limits, cores = config.limits, num_cores()
        self.config = config
        self.keys = Keys(None if config.keys_file is None else Path(config.keys_file))
        self.admission = Admission(limits.max_requests, limits.max_bytes)
        self.pool = ThreadPoolExecutor(cores, thread_name_prefix="images")
        self.reader = Reader(
            self.pool,
            cores,
            max_faces=limits.max_faces,
            face_model=None if config.face_model is None else Path(config.face_model),
            min_face_score=config.min_face_score,
            limits=limits.image_limits(),
        )
        self.meter = Meter()
        self.live = LiveModel(
            Source(config.bundle, config.registry), partial(load_served, config=config), config.watch_s, self.meter
        )
        self.batcher = Batcher(config.max_batch_faces, self.meter)
        self._asking = asyncio.Lock()
        self._ready: tuple[Served, float] | None = None

    def is_healthy(self) -> bool:
        """Whether the inference thread lives and no batch hangs."""
        return self.batcher.is_alive() and self.batcher.busy_s() < HUNG_S

    def check_health(self) -> None:
        """Problem ``not_ready`` where this process is ill."""
        if not self.is_healthy():
            raise Problem("not_ready", "The inference thread has ended or hangs.")

    async def check_ready(self, served: Served) -> None:
        """Problem ``not_ready`` where this process is ill, or the model's canary gets a wrong, late or no answer.

        The canary is asked one at a time, and at most once in ``FRESH_S`` seconds for one model.
        """
        self.check_health()
        async with self._asking:
            if self._ready is not None and self._ready[0] is served and time.monotonic() - self._ready[1] < FRESH_S:
                return
            self._ready = None
            deadline_s = self.config.limits.deadline_s
            try:
                async with asyncio.timeout(deadline_s):
                    found = await self._ask_canary(served)
            except TimeoutError:
                raise Problem("not_ready", f"The canary had no answer within {deadline_s:g} s.") from None
            except RafceError as error:
                raise Problem("not_ready", f"The canary failed: {error}") from error
            expected = calibrated(served.canary.outputs, served.predictor.bundle.calibration)
            off = probabilities_apart(found, Probabilities(expected.emotion[:1], expected.action_units[:1]))
            if not off <= MAX_DIFFERENCE:
                detail = f"The canary's probabilities are off by {off:.2g}; at most {MAX_DIFFERENCE:g} is expected."
                raise Problem("not_ready", detail)
            self._ready = served, time.monotonic()

    async def _ask_canary(self, served: Served) -> Probabilities:
        stream = io.BytesIO()
        Image.fromarray(served.canary.images[0]).save(stream, "PNG")
        px = served.predictor.bundle.preprocessing.stored_px
        image = await self.reader.read(stream.getvalue(), px, "aligned")
        return (await self.batcher.probabilities(served.predictor, image.faces[0].pixels[None])).probabilities

    def measured(self) -> Meter:
        """The counts so far, with present gauges; for one thread at a time."""
        meter, served = self.meter, self.live.served
        meter.tell_model(served.model.version, served.model.sha256, served.predictor.engine.name)
        taxonomy = served.predictor.bundle.taxonomy
        meter.expect_answers(taxonomy.emotions, taxonomy.action_unit_codes)
        meter.tell_drift(served.drift.psi, served.drift.num_faces, served.drift.num_reference_images)
        return meter

    def close(self) -> None:
        """Answer what is in work and end all threads."""
        self.live.close()
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.batcher.close()
