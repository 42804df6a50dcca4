"""What outlives a request: the model that answers, its queue, its limits, keys and counts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from rafce_ray.base.hardware import num_cores
from rafce_ray.service.batching import Admission, Batcher
from rafce_ray.service.config import ServiceConfig
from rafce_ray.service.keys import Keys
from rafce_ray.service.live import LiveModel, Served, load_served, source_of
from rafce_ray.service.meter import Meter
from rafce_ray.service.model_info import Readiness
from rafce_ray.service.predicting import Reader
from rafce_ray.service.problems import Problem

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
        self.live = LiveModel(source_of(config), partial(load_served, config=config), config.watch_s, self.meter)
        self.batcher = Batcher(config.max_batch_faces, self.meter)
        self.readiness = Readiness(self.reader, self.batcher, limits.deadline_s)

    def switch(self, version: str) -> None:
        """Serve this version until the next call, or with ``""`` the live one again; returns when it answers.

        RafceError where it may not be served: the model before stays.
        """
        if version:
            self.live.switch(version)
        else:
            self.live.refresh()

    def is_healthy(self) -> bool:
        """Whether the inference thread lives and no batch hangs."""
        return self.batcher.is_alive() and self.batcher.busy_s() < HUNG_S

    def check_health(self) -> None:
        """Problem ``not_ready`` where this process is ill."""
        if not self.is_healthy():
            raise Problem("not_ready", "The inference thread has ended or hangs.")

    async def check_ready(self, served: Served) -> None:
        """Problem ``not_ready`` where this process is ill or the model's canary gets a wrong answer."""
        self.check_health()
        await self.readiness.check(served)

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
