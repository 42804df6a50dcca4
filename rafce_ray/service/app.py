"""The service as one ASGI application: all routes of a ``Service``, with the edge around them."""

from __future__ import annotations

import asyncio
import time
from functools import partial

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from rafce_ray.service.admin import admin_routes
from rafce_ray.service.answers import ReadyStatus, Status, to_json
from rafce_ray.service.documents import document_routes
from rafce_ray.service.edge import Edge, within
from rafce_ray.service.model_info import model_info
from rafce_ray.service.open_inference import open_inference_routes
from rafce_ray.service.predicting import predict
from rafce_ray.service.problems import EXCEPTION_HANDLERS, deadline_passed
from rafce_ray.service.requests import BodyRules, declared_bytes, read_request
from rafce_ray.service.state import Service

JSON = "application/json"


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
            late = deadline_passed(limits.deadline_s, len(request.items))
            content = await within(predict(request, service, served, scope, since), receive, deadline, late)
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
