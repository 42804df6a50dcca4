"""The refusals of the service: one table of stable codes, and their form in responses (RFC 9457)."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Coroutine, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, with_config
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from typing_extensions import TypedDict

from rafce_ray.base.errors import did_you_mean
from rafce_ray.faces.decode import DecodeError

MEDIA_TYPE = "application/problem+json"

REQUEST_ID = "rafce.request_id"
"""Key of the ASGI scope under which the edge leaves the request's id."""

PROBLEM_CODE = "rafce.problem_code"
"""Key of the ASGI scope under which an answer leaves its problem's code, for the edge to count."""

_PLAIN_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class ProblemType:
    """One kind of refusal: its stable ``code``, HTTP status, what it means, the usual remedy and the kind in words."""

    code: str
    status: int
    meaning: str
    hint: str
    title: str

    @property
    def uri(self) -> str:
        """The ``type`` of the problem, which is also the path of its documentation."""
        return f"/problems/{self.code}"


PROBLEM_TYPES: Mapping[str, ProblemType] = {
    code: ProblemType(code, status, **{"title": code.replace("_", " ").capitalize(), **row})
    for status, rows in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text()).items()
    for code, row in rows.items()
}
"""Every code that the service answers, by code. Those of an image are :class:`rafce_ray.faces.decode.DecodeError`'s."""


class Problem(Exception):
    """A refused request or image: a code of ``PROBLEM_TYPES`` and the details.

    ``hint`` replaces the type's general remedy; ``headers`` go into the response (Retry-After), ``members`` into its
    object.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        hint: str | None = None,
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(code, detail)
        self.type = PROBLEM_TYPES[code]
        self.detail = detail
        self.hint = self.type.hint if hint is None else hint
        self.headers = dict(headers or {})
        self.members = dict(members or {})

    @property
    def code(self) -> str:
        """The stable code."""
        return self.type.code

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.type.status


def problem_of_image(error: DecodeError) -> Problem:
    """The problem of an image that cannot be decoded."""
    return Problem(error.code, sentence(error.message), hint=error.remedy)


@with_config(ConfigDict(extra="forbid"))
class ProblemDocument(TypedDict):
    """What went wrong (RFC 9457), with its remedy. `type` is stable and has a page of its own."""

    type: Annotated[str, Field(pattern="^/problems/[a-z0-9_]+$", description="Stable name of the kind of problem.")]
    title: Annotated[str, Field(description="The kind of problem in words.")]
    status: Annotated[int, Field(ge=400, le=599, description="HTTP status.")]
    detail: Annotated[str, Field(description="What was found and what was expected.")]
    hint: Annotated[str, Field(description="The remedy.")]
    instance: Annotated[str, Field(description="Path of the request.")]
    request_id: Annotated[str, Field(description="As in the x-request-id header.")]


def problem_document(problem: Problem, path: str, request_id: str) -> ProblemDocument:
    """The problem as a JSON object, without the members of its own; ``path`` is the request's."""
    return {
        "type": problem.type.uri,
        "title": problem.type.title,
        "status": problem.status,
        "detail": problem.detail,
        "hint": problem.hint,
        "instance": path,
        "request_id": request_id,
    }


def problem_response(problem: Problem, scope: MutableMapping[str, Any]) -> Response:
    """The problem as a response to the request of an ASGI ``scope`` that passed the edge."""
    scope[PROBLEM_CODE] = problem.code
    document = problem_document(problem, scope["path"], scope.get(REQUEST_ID, ""))
    return Response(json.dumps({**document, **problem.members}).encode(), problem.status, problem.headers, MEDIA_TYPE)


def request_id_of(wanted: bytes) -> str:
    """The id of a request: its X-Request-ID, if that is short and plain, else a new one."""
    return wanted.decode() if _PLAIN_ID.fullmatch(wanted) else f"{random.getrandbits(128):032x}"


def deadline_passed(seconds: float, num_images: int | None = None) -> Problem:
    """The problem of an answer that was not ready; ``num_images``: of the request, where it is known."""
    send = {None: "smaller or fewer pictures", 1: "a smaller picture"}.get(num_images, "fewer pictures a request")
    hint = (
        f"Send {send}, or try again when the service is less busy. Its operator can give it more time or processes: "
        f"rafce serve ... limits.deadline_s={2 * seconds:g} --replicas 2"
    )
    return Problem("deadline", f"The answer was not ready within {seconds:g} s.", hint=hint)


def sentence(text: str) -> str:
    """``text`` with a capital first letter."""
    return text[:1].upper() + text[1:]


def shown(text: str) -> str:
    """A client's text for a message: quoted, in ASCII, cut to 60 characters."""
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def nearest(wanted: str, known: Sequence[str]) -> str:
    """``"Did you mean 'top_k'? "`` for the known name nearest to what a client wrote, or nothing where none is near."""
    near = did_you_mean(wanted[:60], known).removeprefix("; ")
    return f"{sentence(near)} " if near else ""


async def _answer_problem(request: Request, error: Exception) -> Response:
    """Any other exception than a Problem Starlette raises again after this, and the edge logs it."""
    return problem_response(error if isinstance(error, Problem) else unexpected(), request.scope)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals, no such path or method, and the answer to OPTIONS, which no route takes itself."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if "Allow" in headers:
        headers["Allow"] = ", ".join(sorted({*headers["Allow"].split(", "), "OPTIONS"}))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=headers)
    path = request.scope["path"]
    code, detail, hint = "bad_request", error.detail, None
    if error.status_code == 404:
        code, detail = "not_found", f"There is nothing at {shown(path)}."
        near = nearest(path, [route.path for route in request.app.routes if isinstance(route, Route)])
        hint = f"{near}{PROBLEM_TYPES[code].hint}"
    elif error.status_code == 405:
        code, detail = "method_not_allowed", f"{shown(path)} takes no {request.method}."
    return problem_response(Problem(code, detail, hint=hint, headers=headers), request.scope)


def unexpected() -> Problem:
    """The problem of an unexpected failure, without its details."""
    return Problem("internal_error", "The service failed to answer this request.")


EXCEPTION_HANDLERS: Mapping[Any, Callable[[Request, Exception], Coroutine[Any, Any, Response]]] = {
    Problem: _answer_problem,
    HTTPException: _answer_http_exception,
    Exception: _answer_problem,
}
"""For ``Starlette(exception_handlers=...)``: every refusal as a problem."""
