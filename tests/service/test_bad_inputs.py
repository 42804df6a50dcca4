"""The corpus of bad requests through everything that stands before the model: edge, bodies, decoder."""

import asyncio
import importlib.util
import json
import logging
import time
from itertools import islice
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from rafce_ray.decode import DecodeError, decode_image
from rafce_ray.service.admission import Admission
from rafce_ray.service.bodies import BodyRules, Item, declared_bytes, read_request
from rafce_ray.service.config import Limits
from rafce_ray.service.edge import Edge
from rafce_ray.service.problems import EXCEPTION_HANDLERS, REQUEST_ID, Problem, problem_body, problem_of_image

LIMITS = Limits()


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bad_inputs", Path(__file__).with_name("bad_inputs.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hand_made(corpus) -> list:
    return list(corpus.bad_inputs())


def decoding_app() -> Edge:
    """Answers as ``/v1/predict`` does, except that nothing is predicted of an image that can be decoded."""
    admission = Admission(LIMITS.max_requests, LIMITS.max_bytes)
    rules = BodyRules(LIMITS.max_images, LIMITS.max_image_bytes, num_emotions=5)

    def problem_of(item: Item) -> Problem | None:
        if isinstance(item.content, Problem):
            return item.content
        try:
            decode_image(item.content, limits=LIMITS.image_limits())
        except DecodeError as error:
            return problem_of_image(error)
        return None

    async def predict(request: Request) -> JSONResponse:
        scope = request.scope
        with admission.place(declared_bytes(scope)) as place:
            asked = await read_request(scope, request.receive, place, rules)
            problems = [problem_of(item) for item in asked.items]
        if asked.kind == "raw" and problems[0] is not None:
            raise problems[0]
        bodies = [
            None if found is None else problem_body(found, scope["path"], scope[REQUEST_ID]) for found in problems
        ]
        results = [{"id": item.id, "error": body} for item, body in zip(asked.items, bodies, strict=True)]
        return JSONResponse({"results": results})

    app = Starlette(
        routes=[Route("/v1/predict", predict, methods=["POST"])], exception_handlers=dict(EXCEPTION_HANDLERS)
    )
    return Edge(app, LIMITS, loopback_only=True)


def faults(corpus: ModuleType, inputs: list) -> list[str]:
    async def send_all() -> list[str]:
        transport = httpx.ASGITransport(decoding_app())
        found = []
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            for bad in inputs:
                path = f"/v1/predict?{bad.query}" if bad.query else "/v1/predict"
                since = time.monotonic()
                response = await client.post(path, content=bad.body, headers=bad.all_headers())
                found.append(corpus.fault(bad, response.status_code, response.content))
                if time.monotonic() - since > 2:
                    found.append(f"{bad.name}: {time.monotonic() - since:.1f} s")
        return [text for text in found if text is not None]

    return asyncio.run(send_all())


def test_every_hand_made_case_gets_its_documented_answer(corpus, hand_made, caplog):
    with caplog.at_level(logging.INFO, "rafce_ray.service"):
        assert faults(corpus, hand_made) == []
    assert len(caplog.records) == len(hand_made)
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []


def test_mutations_get_their_documented_answers(corpus):
    assert faults(corpus, list(islice(corpus.mutations(seed=1), 400))) == []


@pytest.mark.slow
def test_ten_thousand_mutations_get_their_documented_answers(corpus):
    assert faults(corpus, list(corpus.bad_inputs(10_000, seed=2))) == []


def test_the_corpus_is_the_same_every_time(corpus, hand_made):
    once, again, other = (list(islice(corpus.mutations(seed), 50)) for seed in (3, 3, 4))
    assert once == again
    assert once != other
    assert len({bad.name for bad in [*hand_made, *once]}) == len(hand_made) + 50
    assert list(corpus.bad_inputs(len(hand_made) + 2, seed=3)) == [*hand_made, *once[:2]]


def test_a_fault_is_told(corpus, hand_made):
    bad = hand_made[0]
    answer = {"type": "/problems/empty", "title": "t", "detail": "d", "hint": "h", "instance": "/", "request_id": "1"}
    assert corpus.fault(bad, 422, json.dumps(answer).encode()) is None
    assert "status 500" in corpus.fault(bad, 500, b"")
    assert "expected ['empty']" in corpus.fault(bad, 422, json.dumps({**answer, "type": "/problems/no_face"}).encode())
    assert "no ['hint']" in corpus.fault(bad, 422, json.dumps({**answer, "hint": ""}).encode())
