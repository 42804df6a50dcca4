"""Show and change the live version over HTTP: reload, promote, rollback, for keys with the scope ``admin``.

Requests name versions of the configured registry, never a place.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rafce_ray.base.console import to_json
from rafce_ray.base.errors import RafceError, UsageError
from rafce_ray.base.storage import Location, locate
from rafce_ray.config import explain
from rafce_ray.registry.live import read_live
from rafce_ray.registry.promotion import Outcome, Reason, Refused, Rules, promote, roll_back
from rafce_ray.registry.versions import is_name, list_versions, summary_of, version_names
from rafce_ray.service.answers import Record
from rafce_ray.service.keys import KEY_ID
from rafce_ray.service.problems import Problem, problem_response, sentence, shown
from rafce_ray.service.requests import parse_json

if TYPE_CHECKING:
    from rafce_ray.service.state import Service

MAX_BODY_BYTES = 16 * 1024
MAX_MARKS = 100
RETRY_AFTER_S = 5

log = logging.getLogger(__name__)


_Why = Annotated[str | None, Field(description="The reason, one line; it stays in the history.")]


class Reload(Record):
    """Body of POST /v1/admin/reload, which asks for nothing."""


class Promote(Record):
    """Body of POST /v1/admin/promote."""

    version: str = Field(description="Name of a version of the registry.")
    force: bool = Field(default=False, description="Overrule gates that may be overruled; needs why.")
    why: _Why = None


class Rollback(Record):
    """Body of POST /v1/admin/rollback."""

    why: _Why = None


_Body = TypeVar("_Body", Reload, Promote, Rollback)


def admin_routes(service: Service) -> list[Route]:
    """``POST /v1/admin/{reload,promote,rollback}`` and ``GET /v1/admin/versions``."""
    admin = _Admin(service)
    changes = (admin.reload, admin.promote, admin.rollback)
    routes = [Route(f"/v1/admin/{change.__name__}", change, methods=["POST"]) for change in changes]
    return [*routes, Route("/v1/admin/versions", admin.versions, methods=["GET"])]


class _Admin:
    """One change at a time in one process: its gates load and time models next to the one that answers."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._rules = Rules(engine=service.config.engine)
        self._changing = threading.Lock()

    async def versions(self, request: Request) -> Response:
        """All versions, and which is live and why."""
        self._authorize(request)
        registry = self._registry()

        def describe() -> dict[str, Any]:
            live = read_live(registry)
            versions = [summary_of(version, live) for version in list_versions(registry)]
            return {"live": None if live is None else live.model_dump(mode="json"), "versions": versions}

        return _answer(await asyncio.to_thread(describe))

    async def reload(self, request: Request) -> Response:
        """Look at once whether another version is live."""
        self._authorize(request)
        await _read_body(request, Reload)
        return await self._change(request, lambda: None)

    async def promote(self, request: Request) -> Response:
        """Make a version live that passes its gates, or whose gates are overruled."""
        by, registry = self._authorize(request), self._registry()
        body = await _read_body(request, Promote)
        version, reason = body.version, _reason(by, body.why, body.force)
        if not is_name(version) or version not in await asyncio.to_thread(version_names, registry):
            hint = "GET /v1/admin/versions lists what there is; a bundle is added on the server with rafce bundle add."
            raise Problem("no_such_version", f"The registry has no version {shown(version)}.", hint=hint)
        return await self._change(request, lambda: promote(registry, version, reason, self._rules))

    async def rollback(self, request: Request) -> Response:
        """Roll back to the version before."""
        by, registry = self._authorize(request), self._registry()
        reason = _reason(by, (await _read_body(request, Rollback)).why)
        return await self._change(request, lambda: roll_back(registry, reason, self._rules))

    def _authorize(self, request: Request) -> str:
        """The caller, by the key's id; Problem where the key has not the scope."""
        self._service.keys.authorize(request.scope, "admin")
        return f"key {request.scope.get(KEY_ID, 'unknown')}"

    def _registry(self) -> Location:
        place = self._service.config.registry
        if place is None:
            raise Problem(
                "change_refused",
                "The service serves a bundle folder, which has no versions.",
                hint="Start it with a registry (rafce serve --registry REGISTRY), or replace the folder and reload.",
            )
        return locate(place)

    async def _change(self, request: Request, change: Callable[[], Outcome | None]) -> Response:
        """Answer when the change is made and this process serves the live version.

        The change continues in its thread when the client leaves: it must not stop half-way.
        """
        try:
            return _answer(await asyncio.to_thread(self._make, change))
        except RafceError as error:
            gates = [gate.model_dump(mode="json") for gate in error.gates] if isinstance(error, Refused) else None
            problem = Problem("change_refused", sentence(str(error)), members={"gates": gates})
            return problem_response(problem, request.scope)

    def _make(self, change: Callable[[], Outcome | None]) -> dict[str, Any]:
        live = self._service.live
        if not self._changing.acquire(blocking=False):
            wait = {"retry-after": str(RETRY_AFTER_S)}
            raise Problem("busy", "Another change of what is live is being checked.", headers=wait)
        try:
            before = live.served
            outcome = change()
            if outcome is not None and outcome.changed:
                log.info("%s made %s live (%s)", outcome.live.by, outcome.live.version, outcome.live.action)
            served = live.refresh()
        finally:
            self._changing.release()
        return {
            "serves": {"name": served.model.name, "version": served.model.version, "sha256": served.model.sha256},
            "swapped": served is not before,
            "live": None if outcome is None else outcome.live.model_dump(mode="json"),
            "changed": outcome is not None and outcome.changed,
            "others_follow_within_s": self._service.config.watch_s,
        }


async def _read_body(request: Request, record: type[_Body]) -> _Body:
    """The body's JSON object as a record; an empty body is an empty object. Problem where it is none."""
    body = await request.body()
    if len(body) > MAX_BODY_BYTES:
        raise Problem("body_too_large", f"The body has {len(body):,} bytes; at most {MAX_BODY_BYTES:,} are read here.")
    try:
        return record.model_validate(parse_json(body, max_marks=MAX_MARKS) if body else {}, strict=True)
    except ValidationError as error:
        kinds = {fault["type"] for fault in error.errors()}
        code = "unknown_key" if "extra_forbidden" in kinds else "missing_key" if "missing" in kinds else "wrong_type"
        found = "; ".join(explain(error, record))[:500]
        keys = " and ".join(record.model_fields)
        hint = f"It may have {keys}." if keys else "Send it empty, or {}."
        raise Problem(code, f"The body cannot be used: {found}", hint=hint) from None


def _reason(by: str, why: str | None, force: bool = False) -> Reason:
    try:
        return Reason(why, force, by)
    except UsageError as error:
        raise Problem("bad_request", sentence(str(error)), hint='Send {"why": "TEXT"} with one line.') from None


def _answer(found: Mapping[str, Any]) -> Response:
    return Response(to_json(found), media_type="application/json")
