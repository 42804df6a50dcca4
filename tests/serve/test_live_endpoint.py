"""The running endpoint where things go wrong: bad inputs, another model and a killed replica beside valid requests."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import serve_faults
from http_load import Reply, open_loop, post
from serving import Server, free_port, start_service

from rafce_ray.bundle import load_bundle
from rafce_ray.decode import decode_face
from rafce_ray.predict import Predictor

pytestmark = pytest.mark.ray

RATE = 10
VERSIONS = ("first", "second")


@pytest.fixture(scope="module")
def stats_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(registry: Path, stats_port: int) -> Iterator[Server]:
    """Two replicas that follow the registry."""
    environment = {"OMP_NUM_THREADS": "1", "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port)}
    arguments = ["--registry", str(registry), "--replicas", "2", "--engine", "torch", "watch_s=0.5"]
    found = start_service(*arguments, environment=environment)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def requests(photograph: Path) -> list[bytes]:
    return [post("/v1/predict?faces=aligned", photograph.read_bytes(), "image/png")]


@pytest.fixture(scope="module")
def expected(registry: Path, photograph: Path) -> dict[str, np.ndarray]:
    """By version: the probabilities of the photograph's action units."""
    found = {}
    for version in VERSIONS:
        predictor = Predictor(load_bundle(registry / "versions" / version))
        pixels = decode_face(photograph.read_bytes(), predictor.bundle.preprocessing.stored_px)
        found[version] = predictor.probabilities(pixels[None]).action_units[0]
    assert np.abs(found["first"] - found["second"]).max() > 0.01
    return found


def versions_of(replies: Sequence[Reply], expected: dict[str, np.ndarray]) -> list[str]:
    """The version that each answer names, after a look at whether its figures are that version's."""
    found = []
    for reply in replies:
        answer = json.loads(reply.body)
        version, (face,) = answer["model"]["version"], answer["results"][0]["faces"]
        units = [unit["probability"] for unit in face["action_units"]]
        assert units == pytest.approx(expected[version], abs=1e-4)
        found.append(version)
    return found


def test_bad_inputs_get_their_documented_answers_and_harm_nobody(server, requests, expected):
    corpus = serve_faults.read_corpus()
    replicas = server.pids("replica")
    (faults, slowest), valid = asyncio.run(
        serve_faults.send_bad_beside_valid(server, corpus, list(corpus.bad_inputs(600)), requests, RATE)
    )
    assert faults == []
    assert slowest < 10
    assert {reply.status for reply in valid} == {200}
    assert set(versions_of(valid, expected)) == {"first"}
    assert server.pids("replica") == replicas


def test_another_version_becomes_live_without_a_lost_or_a_mixed_answer(server, registry, make_live, requests, expected):
    async def under_load() -> list[Reply]:
        switch = asyncio.create_task(asyncio.to_thread(make_live, registry, "second"))
        replies, seen = [], 0
        # Each of the two replicas looks for itself.
        while seen < 3:
            latest = await open_loop(server.port, requests, RATE, 2)
            replies += latest
            seen = seen + 1 if switch.done() and {"second"} == set(versions_of(latest, expected)) else 0
        await switch
        return replies

    replies = asyncio.run(asyncio.wait_for(under_load(), 120))
    assert {reply.status for reply in replies} == {200}
    assert set(versions_of(replies, expected)) == {"first", "second"}


def test_a_killed_replica_costs_its_requests_in_flight_at_most_and_comes_again(server, requests, stats_port):
    victim = server.pids("replica")[0]

    async def under_load() -> tuple[list[Reply], float]:
        replies = await open_loop(server.port, requests, RATE, 2)
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        while not await asyncio.to_thread(serve_faults.has_two_again, server, victim, stats_port):
            replies += await open_loop(server.port, requests, RATE, 1)
        return replies + await open_loop(server.port, requests, RATE, 2), killed

    replies, killed = asyncio.run(asyncio.wait_for(under_load(), 180))
    failed = [reply for reply in replies if reply.status != 200]
    assert all(reply.due <= killed <= reply.due + reply.seconds for reply in failed), (killed, failed)
