"""The service as one ASGI application: ``Service`` is its state, ``build_app`` its routes and the edge."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from rafce_ray.base.hardware import num_cores
from rafce_ray.service.admin import admin_routes
from rafce_ray.service.answers import ReadyStatus, Status, to_json
from rafce_ray.service.batching import Admission, Batcher
from rafce_ray.service.config import ServiceConfig
from rafce_ray.service.documents import document_routes
from rafce_ray.service.edge import Edge, within
from rafce_ray.service.keys import Keys
from rafce_ray.service.live import LiveModel, Served, load_served, source_of
from rafce_ray.service.meter import Meter
from rafce_ray.service.model_info import Readiness, model_info
from rafce_ray.service.open_inference import open_inference_routes
from rafce_ray.service.predicting import Context, Reader, predict
from rafce_ray.service.problems import EXCEPTION_HANDLERS, REQUEST_ID, Problem, deadline_passed
from rafce_ray.service.requests import BodyRules, declared_bytes, read_request

HUNG_S = 60.0
"""Seconds after which a running batch counts as hung; a batch takes less than a tenth of it."""

JSON = "application/json"


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


def build_app(service: Service) -> ASGIApp:
    """All routes of a service, with :class:`Edge` around them."""
    app = Starlette(
        routes=[
            Route("/v1/predict", _Predict(service), methods=["POST"]),
            Route("/healthz", partial(_healthz, service)),
            Route("/readyz", partial(_readyz, service)),
            Route("/v1/model", partial(_model, service)),
            *admin_routes(service),
            *open_inference_routes(service),
            *document_routes(service.config),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
    )
    # A redirect would be built from the client's Host header.
    app.router.redirect_slashes = False
    return Edge(app, service.config.limits, service.config.callers(), meter=service.meter)


class _Predict:
    """``POST /v1/predict`` as plain ASGI: nothing is done for a request that it does not need."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, since = self._service, time.monotonic()
        deadline = asyncio.get_running_loop().time() + service.config.limits.deadline_s
        service.keys.authorize(scope, "predict")
        with service.admission.place(declared_bytes(scope)) as place:
            served = service.live.served
            limits, num_emotions = service.config.limits, served.predictor.bundle.taxonomy.num_emotions
            rules = BodyRules(limits.max_images, limits.max_image_bytes, num_emotions)
            request = await read_request(scope, receive, place, rules, service.pool)
            context = Context(
                service.reader, service.batcher, service.meter, served, scope["path"], scope[REQUEST_ID], since
            )
            content = await within(
                predict(request, context), receive, deadline, deadline_passed(limits.deadline_s, len(request.items))
            )
        await Response(content, media_type=JSON)(scope, receive, send)


async def _healthz(service: Service, request: Request) -> Response:
    service.check_health()
    return Response(to_json(Status("ok")), media_type=JSON)


async def _readyz(service: Service, request: Request) -> Response:
    served = service.live.served
    await service.check_ready(served)
    return Response(to_json(ReadyStatus("ready", served.model)), media_type=JSON)


async def _model(service: Service, request: Request) -> Response:
    info = model_info(service.config, service.live.served, service.live.failed)
    return Response(info.model_dump_json(), media_type=JSON)
