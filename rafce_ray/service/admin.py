"""What is live, asked and changed over HTTP: reload, promote, rollback, for keys with the scope ``admin``.

Versions are named, and lie in the configured registry; no request names a place.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rafce_ray.console import to_json
from rafce_ray.errors import RafceError, UsageError
from rafce_ray.registry.live import read_live
from rafce_ray.registry.promotion import Outcome, Reason, Refused, Rules, promote, roll_back
from rafce_ray.registry.summary import summary_of
from rafce_ray.registry.versions import is_name, list_versions, version_names
from rafce_ray.service.json_bodies import parse_json
from rafce_ray.service.keys import KEY_ID
from rafce_ray.service.predict_request import json_type
from rafce_ray.service.problems import Problem, nearest, problem_response, sentence, shown
from rafce_ray.storage import Location, locate

if TYPE_CHECKING:
    from rafce_ray.service.app import Service

MAX_BODY_BYTES = 16 * 1024
MAX_MARKS = 100
RETRY_AFTER_S = 5

log = logging.getLogger(__name__)


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
        await _read_fields(request, {})
        return await self._change(request, lambda: None)

    async def promote(self, request: Request) -> Response:
        """Make a version live that passes its gates, or whose gates are overruled."""
        by = self._authorize(request)
        registry = self._registry()
        fields = await _read_fields(request, {"version": str, "force": bool, "why": str})
        version = fields.get("version")
        if version is None:
            raise Problem("missing_key", "The body has no version.", hint='Send {"version": "NAME"}.')
        reason = _reason(by, fields)
        if not is_name(version) or version not in await asyncio.to_thread(version_names, registry):
            hint = "GET /v1/admin/versions lists what there is; a bundle is added on the server with rafce bundle add."
            raise Problem("no_such_version", f"The registry has no version {shown(version)}.", hint=hint)
        rules = Rules(engine=self._service.config.engine)
        return await self._change(request, lambda: promote(registry, version, reason, rules))

    async def rollback(self, request: Request) -> Response:
        """Make live again what was before."""
        by = self._authorize(request)
        registry = self._registry()
        reason = _reason(by, await _read_fields(request, {"why": str}))
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


async def _read_fields(request: Request, types: Mapping[str, type]) -> dict[str, Any]:
    """The body's JSON object, whose keys may be those of ``types``; an empty body is an empty object. Problem where it is another."""
    body = await request.body()
    if len(body) > MAX_BODY_BYTES:
        raise Problem("body_too_large", f"The body has {len(body):,} bytes; at most {MAX_BODY_BYTES:,} are read here.")
    fields = parse_json(body, max_marks=MAX_MARKS) if body else {}
    if not isinstance(fields, dict):
        raise Problem("wrong_type", f"The body is {json_type(fields)}.", hint="Make it an object.")
    for key, value in fields.items():
        if key not in types:
            known = f"It may have {' and '.join(types)}." if types else "It may be empty."
            raise Problem(
                "unknown_key", f"The body has an unknown key {shown(key)}.", hint=f"{nearest(key, list(types))}{known}"
            )
        if type(value) is not types[key]:
            expected = {str: "a string", bool: "true or false"}[types[key]]
            raise Problem("wrong_type", f"{key} is {json_type(value)}.", hint=f"Make it {expected}.")
    return fields


def _reason(by: str, fields: Mapping[str, Any]) -> Reason:
    try:
        return Reason(fields.get("why"), fields.get("force", False), by)
    except UsageError as error:
        raise Problem("bad_request", sentence(str(error)), hint='Send {"why": "TEXT"} with one line.') from None


def _answer(found: Mapping[str, Any]) -> Response:
    return Response(to_json(found), media_type="application/json")


def _refusal(request: Request, error: RafceError, gates: list[dict[str, Any]] | None) -> Response:
    """Why the change was not made, with every gate's figures."""
    return problem_response(Problem("change_refused", sentence(str(error)), members={"gates": gates}), request.scope)
