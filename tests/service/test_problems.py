import asyncio
import inspect
import json
import re

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rafce_ray.faces import decode
from rafce_ray.service.problems import (
    EXCEPTION_HANDLERS,
    MEDIA_TYPE,
    PROBLEM_TYPES,
    REQUEST_ID,
    Problem,
    nearest,
    problem_document,
    problem_of_image,
    shown,
)


def test_every_type_says_what_it_is_and_what_to_do():
    for code, type_ in PROBLEM_TYPES.items():
        assert re.fullmatch("[a-z0-9_]+", code)
        assert type_.uri == f"/problems/{code}"
        assert 400 <= type_.status < 600
        assert type_.title
        assert type_.meaning.endswith(".")
        assert type_.hint
    titles = [type_.title for type_ in PROBLEM_TYPES.values()]
    assert len(set(titles)) == len(titles)


def test_every_code_of_the_decoder_has_a_type():
    codes = set(re.findall(r'DecodeError\(\s*"([a-z_]+)"', inspect.getsource(decode)))
    assert len(codes) == 8
    assert codes <= set(PROBLEM_TYPES)


def test_a_problem_has_the_members_of_rfc_9457_and_ours():
    problem = Problem("busy", "All places are taken.", headers={"retry-after": "1"})
    assert problem_document(problem, "/v1/predict", "r1") == {
        "type": "/problems/busy",
        "title": "Busy",
        "status": 429,
        "detail": "All places are taken.",
        "hint": "Try again after Retry-After.",
        "instance": "/v1/predict",
        "request_id": "r1",
    }
    assert Problem("busy", "x", hint="Wait.").hint == "Wait."


def test_a_code_that_is_not_in_the_table_cannot_be_raised():
    with pytest.raises(KeyError):
        Problem("no_such_code", "x")


def test_an_image_keeps_the_decoders_words():
    with pytest.raises(decode.DecodeError) as caught:
        decode.decode_image(b"GIF89a")
    problem = problem_of_image(caught.value)
    assert (problem.code, problem.status) == ("unsupported_format", 415)
    assert problem.detail == "GIF is not read."
    assert problem.hint == "Save the picture as JPEG, PNG or WebP."


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "headers"),
    [
        ("GET", "/problem", 429, "busy", {"retry-after": "7"}),
        ("GET", "/nowhere", 404, "not_found", {}),
        ("POST", "/problem", 405, "method_not_allowed", {"allow": "GET, HEAD"}),
        ("GET", "/bug", 500, "internal_error", {}),
    ],
)
def test_starlette_answers_with_problems_only(method, path, status, code, headers):
    async def problem(request: Request) -> Response:
        raise Problem("busy", "Full.", headers={"retry-after": "7"})

    async def bug(request: Request) -> Response:
        raise ZeroDivisionError("secret")

    app = Starlette(
        routes=[Route("/problem", problem), Route("/bug", bug)], exception_handlers=dict(EXCEPTION_HANDLERS)
    )

    async def with_id(scope, receive, send):
        await app({**scope, REQUEST_ID: "r1"}, receive, send)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(with_id, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path)

    response = asyncio.run(ask())
    assert response.status_code == status
    assert response.headers["content-type"] == MEDIA_TYPE
    assert {key: response.headers[key] for key in headers}.keys() == headers.keys()
    body = json.loads(response.content)
    assert (body["type"], body["status"], body["instance"], body["request_id"]) == (
        f"/problems/{code}",
        status,
        path,
        "r1",
    )
    assert "secret" not in response.text


def test_a_clients_text_is_shown_in_short_ascii():
    assert shown("a\nb\ud800") == r"'a\nb\ud800'"
    assert len(shown("x" * 1000)) == 62


def test_the_nearest_name_is_told():
    assert nearest("topk", ("faces", "top_k")) == "Did you mean 'top_k'? "
    assert nearest("zzzzzz", ("faces", "top_k")) == ""
