"""The service as a Ray Serve deployment; ``build_app`` is what ``serve/*.yaml`` name as their ``import_path``."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from ray import serve
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from rafce_ray.base.errors import RafceError
from rafce_ray.config import ConfigError, explain
from rafce_ray.serve.metrics import Export
from rafce_ray.serve.ray_private import MIDDLEWARES, USES_HAPROXY, logs_folder
from rafce_ray.service import app, state
from rafce_ray.service.config import ServiceConfig, read_service_config
from rafce_ray.service.edge import log_as_json

log = logging.getLogger(__name__.replace("serve", "service"))


class LiveVersion(BaseModel, frozen=True, extra="forbid"):
    """``user_config``: the settings that can change while the service runs."""

    version: str = Field("", description="Version that is served whatever the registry says; empty: the live one.")


SETTINGS: Mapping[str, Any] = {
    "name": "rafce",
    "user_config": {"version": ""},
    # The service has its own bound (limits.max_requests) and refuses at once; Serve's bounds are behind it.
    "max_ongoing_requests": 512,
    "max_queued_requests": 64,
    "backpressure_config": {"status_code": 429, "retry_after_s": 1.0},
    "max_surge_percent": 100,
    "health_check_period_s": 5,
    "health_check_timeout_s": 10,
    "graceful_shutdown_timeout_s": 30,
    "max_constructor_retry_count": 3,
    # The service writes an access log of its own, without addresses.
    "logging_config": LoggingConfig(encoding="JSON", enable_access_log=False),
}
"""Defaults of the deployment, which ``serve/*.yaml`` and ``rafce serve`` may replace."""


class FaceService:
    """One replica: a model, and the whole HTTP application before it."""

    def __init__(self, config: ServiceConfig) -> None:
        """Load and verify the model. RafceError where it may not be served."""
        # Standard error is Serve's log. A line in it costs as much of the event loop as the rest of a request.
        log_as_json(file=log_file())
        if not USES_HAPROXY or not MIDDLEWARES:
            log.warning(
                "requests come through Ray Serve's Python proxy, ten times slower and steered by clients' headers: "
                "set the variables of python -m rafce_ray.serve.fast_path before Ray starts"
            )
        self._service = state.Service(config)
        self._export = Export(self._service.measured)
        self._configured = False
        # What was imported and loaded stays: looking through it again for garbage stops all requests for 0.3 s.
        gc.collect()
        gc.freeze()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application, which Serve asks for after the constructor."""
        return app.build_app(self._service)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve another version; the log reports one that is refused, and the version before stays.

        RafceError where the replica's first version is refused.
        """
        try:
            version = read_live_version(user_config).version
            if version or self._configured:
                await asyncio.to_thread(self._service.live.switch, version)
        except RafceError as error:
            # An exception would make Serve replace replicas that answer by replicas that cannot start.
            if not self._configured:
                raise
            log.error("user_config %s is refused: %s", dict(user_config), error)
        self._configured = True

    def check_health(self) -> None:
        """Serve replaces a replica for which this fails three times in a row."""
        self._service.check_health()

    def __del__(self) -> None:
        """Serve calls this once, when the replica has answered what it had."""
        for part in ("_service", "_export"):
            if hasattr(self, part):
                getattr(self, part).close()


def log_file() -> Path:
    """Where this replica writes its log: next to Serve's own, where the dashboard and log collectors find it."""
    context = serve.get_replica_context()
    return logs_folder() / f"service_{context.deployment}_{context.replica_id.unique_id}.log"


def build_app(args: dict[str, Any]) -> serve.Application:
    """The application of a YAML file's ``args``, which are a :class:`ServiceConfig`. ConfigError for a typo."""
    return bound(read_service_config(args))


def bound(config: ServiceConfig, **options: Any) -> serve.Application:
    """The application of a service; ``options`` as of ``Deployment.options``."""
    return serve.deployment(serve.ingress()(FaceService), **SETTINGS).options(**options).bind(config)


def read_live_version(values: Mapping[str, Any]) -> LiveVersion:
    """``user_config`` from plain values. ConfigError for a typo."""
    try:
        return LiveVersion.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("user_config: " + "; ".join(explain(error, LiveVersion))) from None
