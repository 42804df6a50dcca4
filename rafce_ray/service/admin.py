"""What is live, asked and changed over HTTP: reload, promote, rollback, for keys with the scope ``admin``.

Versions are named, and lie in the configured registry; no request names a place.
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
    from rafce_ray.service.app import Service

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
    return [
        Route("/v1/admin/reload", admin.reload, methods=["POST"]),
        Route("/v1/admin/promote", admin.promote, methods=["POST"]),
        Route("/v1/admin/rollback", admin.rollback, methods=["POST"]),
        Route("/v1/admin/versions", admin.versions, methods=["GET"]),
    ]


class _Admin:
    """One change at a time in one process: its gates load and time models beside the one that answers."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._changing = threading.Lock()

    async def versions(self, request: Request) -> Response:
        """All versions, and which is live and why."""
        self._authorize(request)
        found = await asyncio.to_thread(_describe, self._registry())
        return _answer(found)

    async def reload(self, request: Request) -> Response:
        """Look at once whether another version is live."""
        self._authorize(request)
        await _read_body(request, Reload)
        return await self._change(request, lambda: None)

    async def promote(self, request: Request) -> Response:
        """Make a version live that passes its gates, or whose gates are overruled."""
        by = self._authorize(request)
        registry = self._registry()
        body = await _read_body(request, Promote)
        version, reason = body.version, _reason(by, body.why, body.force)
        if not is_name(version) or version not in await asyncio.to_thread(version_names, registry):
            hint = "GET /v1/admin/versions lists what there is; a bundle is added on the server with rafce bundle add."
            raise Problem("no_such_version", f"The registry has no version {shown(version)}.", hint=hint)
        rules = Rules(engine=self._service.config.engine)
        return await self._change(request, lambda: promote(registry, version, reason, rules))

    async def rollback(self, request: Request) -> Response:
        """Make live again what was before."""
        by = self._authorize(request)
        registry = self._registry()
        reason = _reason(by, (await _read_body(request, Rollback)).why)
        rules = Rules(engine=self._service.config.engine)
        return await self._change(request, lambda: roll_back(registry, reason, rules))

    def _authorize(self, request: Request) -> str:
        """Who asks, by the key's id; Problem where they may not."""
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
        """Answer a change once it is made and this process serves what is live.

        It goes on in its thread when the client leaves: half a change is worse than one that nobody heard of.
        """
        try:
            found = await asyncio.to_thread(self._make, change)
        except Refused as refused:
            gates = [gate.model_dump(mode="json") for gate in refused.gates]
            return _refusal(request, refused, gates)
        except RafceError as error:
            return _refusal(request, error, None)
        return _answer(found)

    def _make(self, change: Callable[[], Outcome | None]) -> dict[str, Any]:
        live = self._service.live
        if not self._changing.acquire(blocking=False):
            headers = {"retry-after": str(RETRY_AFTER_S)}
            raise Problem("busy", "Another change of what is live is being checked.", headers=headers)
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


def _describe(registry: Location) -> dict[str, Any]:
    live = read_live(registry)
    versions = [summary_of(version, live) for version in list_versions(registry)]
    return {"live": None if live is None else live.model_dump(mode="json"), "versions": versions}


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
        raise Problem(code, f"The body cannot be used: {found}", hint=_keys_of(record)) from None


def _keys_of(record: type[Record]) -> str:
    keys = " and ".join(record.model_fields)
    return f"It may have {keys}." if keys else "Send it empty, or {}."


def _reason(by: str, why: str | None, force: bool = False) -> Reason:
    try:
        return Reason(why, force, by)
    except UsageError as error:
        raise Problem("bad_request", sentence(str(error)), hint='Send {"why": "TEXT"} with one line.') from None


def _answer(found: Mapping[str, Any]) -> Response:
    return Response(to_json(found), media_type="application/json")


def _refusal(request: Request, error: RafceError, gates: list[dict[str, Any]] | None) -> Response:
    """Why the change was not made, with every gate's figures."""
    return problem_response(Problem("change_refused", sentence(str(error)), members={"gates": gates}), request.scope)
