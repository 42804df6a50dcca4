"""The corpus of bad requests through the whole application."""

import asyncio
import json
import logging
from collections.abc import Callable
from itertools import islice
from types import ModuleType

import httpx
import pytest
from serve_faults import read_corpus
from starlette.types import ASGIApp

from rafce_ray.service.app import build_app
from rafce_ray.service.state import Service


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    return read_corpus()


@pytest.fixture(scope="module")
def hand_made(corpus) -> list:
    return list(corpus.bad_inputs())


@pytest.fixture(scope="module")
def faults(corpus: ModuleType, service: Service) -> Callable[[list], list[str]]:
    """``faults(inputs)``: what the whole application answered to these inputs that is not documented."""
    app = build_app(service)
    return lambda inputs: _faults(corpus, app, inputs)


def _faults(corpus: ModuleType, app: ASGIApp, inputs: list) -> list[str]:
    async def send_all() -> list[str]:
        transport = httpx.ASGITransport(app)
        found = []
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            for bad in inputs:
                path = f"/v1/predict?{bad.query}" if bad.query else "/v1/predict"
                response = await client.post(path, content=bad.body, headers=bad.all_headers())
                found.append(corpus.fault(bad, response.status_code, response.content))
        return [text for text in found if text is not None]

    return asyncio.run(send_all())


def test_every_hand_made_case_gets_its_documented_answer(faults, hand_made, caplog):
    with caplog.at_level(logging.INFO, "rafce_ray.service"):
        assert faults(hand_made) == []
    assert len(caplog.records) == len(hand_made)
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []


def test_mutations_get_their_documented_answers(faults, corpus):
    assert faults(list(islice(corpus.mutations(seed=1), 1000))) == []


@pytest.mark.long
def test_ten_thousand_mutations_get_their_documented_answers(faults, corpus):
    assert faults(list(corpus.bad_inputs(10_000, seed=2))) == []


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
