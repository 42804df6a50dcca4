"""The refusals of the service: one table of stable codes, and their form in responses (RFC 9457)."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Coroutine, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

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
    """One kind of refusal: its stable ``code``, HTTP status, what it means and the usual remedy."""

    code: str
    status: int
    meaning: str
    hint: str
    name: str = ""

    @property
    def title(self) -> str:
        """The kind in a few words: its name or, by default, the code's words."""
        return self.name or self.code.replace("_", " ").capitalize()

    @property
    def uri(self) -> str:
        """The ``type`` of the problem, which is also the path of its documentation."""
        return f"/problems/{self.code}"


_AGAIN = "Send the picture again as an ordinary JPEG, PNG or WebP file."

_TABLE: dict[str, tuple[int, str, str] | tuple[int, str, str, str]] = {
    "bad_request": (400, "The request is malformed.", "Correct what the detail names."),
    "bad_headers": (
        400,
        "A header is repeated, or two headers contradict each other.",
        "Send each header once, and either Content-Length or Transfer-Encoding.",
    ),
    "body_incomplete": (400, "The body and Content-Length differ in length.", "Send the body's true length."),
    "malformed_json": (
        400,
        "The body is not one JSON value in UTF-8; NaN and Infinity are no JSON.",
        "Send a body that a strict JSON parser accepts.",
        "Malformed JSON",
    ),
    "json_too_complex": (
        400,
        "The JSON is nested too deeply or has more members than any valid request.",
        'Send {"images": [{"id": ..., "data": ...}], "options": {...}} and nothing else.',
        "JSON too complex",
    ),
    "duplicate_key": (400, "A JSON object has the same key twice.", "Leave one of them out."),
    "duplicate_id": (400, "Two images of one request have the same id.", "Give each image its own id."),
    "bad_id": (400, "An image's id is no short printable text.", "Use 1 to 128 printable characters."),
    "missing_key": (400, "A required JSON key or form part is not there.", "Add it."),
    "unknown_key": (400, "A JSON key or form part has no meaning here.", "Correct or remove it."),
    "wrong_type": (400, "A JSON value has the wrong type.", "Correct it."),
    "unknown_option": (400, "There is no such option.", "Correct or remove it."),
    "bad_option": (400, "An option has a value that is not allowed.", "Use a value that is allowed."),
    "bad_base64": (400, "An image's data is not base64 (RFC 4648).", "Encode the file's bytes: base64 photo.jpg"),
    "malformed_multipart": (
        400,
        "The body is not multipart/form-data with the boundary that Content-Type names.",
        "Let the HTTP client build the form: curl -F files=@photo.jpg",
    ),
    "key_needed": (401, "The request has no bearer key.", "Send the header Authorization: Bearer KEY."),
    "wrong_key": (401, "The key is not one of this service's.", "Check the key with its operator."),
    "scope_missing": (
        403,
        "The key is known but may not do this.",
        "Use a key with the scope that the detail names.",
        "Not allowed",
    ),
    "not_loopback": (
        403,
        "The service runs without keys and so answers its own machine only.",
        "Start it with a keys file and loopback_only: false to serve others.",
        "This machine only",
    ),
    "cross_site": (
        403,
        "A page of another site or a foreign host name asked a service that is for its own machine only.",
        "Open the service by http://127.0.0.1:PORT or http://localhost:PORT; behind a proxy, start it with --keys "
        "keys.json.",
        "Another site's request",
    ),
    "not_found": (404, "There is nothing at this path.", "See /docs for what there is."),
    "no_such_version": (
        404,
        "The registry has no version of this name.",
        "Take a name that GET /v1/admin/versions lists.",
    ),
    "method_not_allowed": (405, "The path does not take this method.", "See /docs."),
    "change_refused": (
        409,
        "The version may not become live: a gate says no, or there is nothing to go back to. What was live stays.",
        "See gates for the figures; force with a why overrules them.",
    ),
    "body_too_slow": (408, "The whole body did not arrive in time.", "Use a faster connection or smaller pictures."),
    "body_too_large": (413, "The body has too many bytes.", "Send smaller or fewer pictures in a request."),
    "too_many_images": (413, "One request has too many images.", "Split it into several."),
    "too_many_bytes": (
        413,
        "An image's file has too many bytes.",
        "Make it smaller or compress it more.",
        "Image file too large",
    ),
    "uri_too_long": (414, "Path and query are too long.", "Put nothing but options in the query.", "Address too long"),
    "unsupported_media_type": (
        415,
        "This path does not take the body's Content-Type.",
        "Use image/jpeg, image/png, image/webp, application/json or multipart/form-data.",
    ),
    "unsupported_encoding": (
        415,
        "The body is compressed.",
        "Send it without Content-Encoding.",
        "Unsupported content encoding",
    ),
    "unsupported_format": (415, "The file is no JPEG, PNG or WebP.", _AGAIN, "Unsupported image format"),
    "empty": (422, "The picture has no bytes.", "Send a JPEG, PNG or WebP picture."),
    "bad_header": (422, "The picture's header is damaged.", _AGAIN, "Unreadable header"),
    "too_small": (422, "The picture has too few pixels.", "Send a larger picture.", "Picture too small"),
    "too_large": (422, "The picture has too many pixels.", "Scale the picture down.", "Picture too large"),
    "too_many_scans": (422, "The JPEG has more scans than a picture needs.", _AGAIN),
    "undecodable": (422, "The picture is damaged or cut short.", "Get it again from its source."),
    "no_face": (422, "No face was found in the picture.", "Send a frontal face, or faces=aligned for an aligned face."),
    "no_image_read": (422, "None of the images could be answered; results says why.", "Correct what the results name."),
    "busy": (429, "The service already has as many requests or bytes as it takes.", "Try again after Retry-After."),
    "too_many_wrong_keys": (
        429,
        "This peer sent many wrong keys within a minute.",
        "Wait for Retry-After seconds and use a valid key.",
    ),
    "headers_too_large": (431, "The headers are too many or too long.", "Send fewer headers."),
    "client_gone": (499, "The client closed the connection before the answer.", "Send it again."),
    "internal_error": (500, "The service failed.", "Report the request id to its operator."),
    "unknown_method": (501, "HTTP has no such method.", "See /docs, and send the method in capitals."),
    "not_ready": (503, "The model is not loaded or not verified yet.", "Try again; see /readyz."),
    "deadline": (
        504,
        "The answer was not ready in time.",
        "Try again, with smaller or fewer pictures. Its operator can raise limits.deadline_s or --replicas.",
        "Deadline passed",
    ),
}
"""Of each code: HTTP status, meaning, usual remedy and, if it is not the code in words, the title."""

PROBLEM_TYPES: Mapping[str, ProblemType] = {code: ProblemType(code, *row) for code, row in _TABLE.items()}
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
