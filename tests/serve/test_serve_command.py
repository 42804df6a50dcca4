"""`rafce serve` as a user runs it: two replicas that follow a registry on an object store which answers one request in
twenty with 503.

From the command to the answer of a photograph, past bad inputs, another model and a killed replica, to its end; and
what it refuses.
"""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import serve_faults
from http_load import Reply, form, open_loop, post
from matplotlib import cbook
from processes import is_alive, listens, running
from prometheus_client.parser import text_string_to_metric_families
from serving import Server, free_port, start_service

from rafce_ray.base.storage import locate
from rafce_ray.bundle.bundle import Bundle, load_bundle
from rafce_ray.bundle.model import Predictor, predict_files
from rafce_ray.faces.decode import decode_face
from rafce_ray.faces.files import load_file
from rafce_ray.registry.versions import version_folder

pytestmark = pytest.mark.ray

README = Path(__file__).parents[2] / "README.md"
FAULTS = {"faults": 0.05, "seed": 5}
RATE = 10
NUM_FORMS, FACES_A_FORM = 60, 14
"""Four times as many faces as the drift of a replica needs, 200."""


def ask(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), {k.lower(): v for k, v in response.getheaders()}
    finally:
        connection.close()


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> Path:
    """What the command tells people."""
    return tmp_path_factory.mktemp("serve") / "said"


@pytest.fixture(scope="module")
def stats_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def on_s3(fill_registry, s3_place) -> str:
    """A registry of two versions on the object store."""
    place = s3_place("serve/registry")
    fill_registry(place)
    return place


@pytest.fixture(scope="module")
def server(on_s3, said, stats_port, on_its_own, s3_door) -> Iterator[Server]:
    port = free_port()
    argv = [sys.executable, "-m", "rafce_ray.serve", "--registry", on_s3, "--port", str(port), "--replicas", "2"]
    argv += ["--engine", "torch", "watch_s=0.5"]
    environment = on_its_own | {"RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port)}
    options = {"stdout": subprocess.PIPE, "text": True}
    with s3_door.orders(**FAULTS), running(argv, environment, said, **options) as process:
        line = process.stdout.readline()
        assert line.strip() == f"http://127.0.0.1:{port}", said.read_text()
        yield Server(process, port)


@pytest.fixture(scope="module")
def bundles(on_s3) -> dict[str, Bundle]:
    """By version."""
    return {name: load_bundle(str(version_folder(locate(on_s3), name))) for name in ("first", "second")}


@pytest.fixture(scope="module")
def requests(photograph: Path) -> list[bytes]:
    return [post("/v1/predict?faces=aligned", photograph.read_bytes(), "image/png")]


Series = dict[tuple[str, frozenset], float]


@pytest.fixture(scope="module")
def scrape(server, said: Path) -> Callable[[], Series]:
    """``scrape()``: the metrics of the node as Prometheus gets them, from the place that the command names."""
    (url,) = re.findall(r"metrics for Prometheus: (http\S+)", said.read_text())

    def ask_agent() -> Series:
        with urllib.request.urlopen(url, timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    return ask_agent


def named(series: Series, name: str, **labels: str) -> list[float]:
    """Values of the service's series of this name that have these labels among theirs."""
    return [
        value
        for (other, found), value in series.items()
        if other == f"ray_rafce_serve_{name}" and labels.items() <= dict(found).items()
    ]


def total(series: Series, name: str, **labels: str) -> float:
    return sum(named(series, name, **labels))


def test_the_dashboard_shows_the_service_by_its_name(server, said: Path):
    (address,) = re.findall(r"dashboard: (http://127\.0\.0\.1:\d+)/#/serve", said.read_text())
    with urllib.request.urlopen(f"{address}/api/serve/applications/", timeout=30) as answer:
        (application,) = json.loads(answer.read())["applications"].values()
    assert (application["name"], application["status"]) == ("rafce", "RUNNING")


def test_a_scrape_has_every_watched_metric_and_counts_what_was_sent(server, scrape, watched_names, photograph: Path):
    """Before all that send something, so that nothing else is counted meanwhile."""
    deadline = time.monotonic() + 60
    while len(named(before := scrape(), "swaps_total")) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    # What is not known yet is absent, since Ray exports no NaN, and what has not happened yet is there as 0.
    assert named(before, "drift_psi") == []
    assert named(before, "requests_total", route="/v1/predict", status="500") == [0, 0]
    image = photograph.read_bytes()
    body, kind = form(*[image] * FACES_A_FORM, options=[("faces", "aligned")])
    for _ in range(NUM_FORMS):
        assert ask(server.port, "POST", "/v1/predict", body, Content_Type=kind)[0] == 200
    for _ in range(3):
        assert ask(server.port, "POST", "/v1/predict", b"GIF89a", Content_Type="image/png")[0] == 415
    num_faces = NUM_FORMS * FACES_A_FORM
    expected = {
        ("requests_total", ("route", "/v1/predict"), ("status", "200")): NUM_FORMS,
        ("requests_total", ("route", "/v1/predict"), ("status", "415")): 3,
        ("request_ms_count", ("route", "/v1/predict")): NUM_FORMS + 3,
        ("request_ms_bucket", ("route", "/v1/predict"), ("le", "+Inf")): NUM_FORMS + 3,
        ("rejected_total",): 3,
        ("rejected_total", ("reason", "unsupported_format")): 3,
        ("image_rejected_total", ("reason", "unsupported_format")): 3,
        ("no_face_total",): 0,
        ("decode_ms_count",): NUM_FORMS,
        ("queue_ms_bucket", ("le", "+Inf")): NUM_FORMS,
        ("infer_ms_count",): NUM_FORMS,
        ("faces_total",): num_faces,
        ("prediction_total",): num_faces,
        ("confidence_count",): num_faces,
        ("swaps_total",): 0,
    }

    def counted() -> dict[tuple, float]:
        now = scrape()
        return {
            (name, *labels): total(now, name, **dict(labels)) - total(before, name, **dict(labels))
            for name, *labels in expected
        }

    def missing() -> list[str]:
        there = {name for name, _ in scrape()}
        return [f"{name} of {places}" for name, places in watched_names.items() if name not in there]

    # A replica publishes every 2 s, and the node hears of it every 10 s.
    deadline = time.monotonic() + 60
    while (counted() != expected or missing()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert counted() == expected
    assert missing() == []
    now = scrape()
    # A single face again and again is as far from an even reference as can be.
    assert all(psi > 1 for psi in named(now, "drift_psi", statistic="emotion"))
    assert set(named(now, "drift_reference_images")) == {1200}
    assert named(now, "model_info") == [1, 1]


def test_a_face_gets_the_answer_of_rafce_predict(server, bundles, photograph: Path):
    status, answer, headers = ask(
        server.port, "POST", "/v1/predict?faces=aligned", photograph.read_bytes(), Content_Type="image/png"
    )
    assert status == 200, answer
    bundle = bundles["first"]
    loaded = load_file(photograph, finder=None, px=bundle.preprocessing.stored_px)
    (expected,) = predict_files(Predictor(bundle), [loaded], batch_size=1, top_k=3)
    (face,) = answer["results"][0]["faces"]
    (wanted,) = expected.to_json()["faces"]
    assert face["box"] == wanted["box"]
    for found, other in zip(face["emotion"]["top"], wanted["emotion"]["top"], strict=True):
        assert found["label"] == other["label"]
        assert found["probability"] == pytest.approx(other["probability"], abs=1e-6)
    for found, other in zip(face["action_units"], wanted["action_units"], strict=True):
        assert found["probability"] == pytest.approx(other["probability"], abs=1e-6)
    assert answer["model"] | {"version": "first", "sha256": bundle.weights_sha256} == answer["model"]
    assert headers["cache-control"] == "no-store"


def test_refusals_come_through_as_the_service_gives_them(server):
    status, problem, headers = ask(
        server.port, "POST", "/v1/predict", b"GIF89a", Content_Type="image/png", x_request_id="mine"
    )
    assert (status, problem["type"], problem["request_id"]) == (415, "/problems/unsupported_format", "mine")
    assert headers["content-type"] == "application/problem+json"
    assert headers["x-request-id"] == "mine"
    status, problem, _ = ask(server.port, "GET", "/nowhere")
    assert (status, problem["type"]) == (404, "/problems/not_found")


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", (400, "/problems/bad_headers")),
        (b"BREW / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (501, "/problems/unknown_method")),
    ],
)
def test_what_cannot_be_read_is_a_problem_too(server, start: bytes, expected: tuple[int, str]):
    """By way of Serve's own proxy, which HAProxy must have been told of."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(start)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        problem = json.loads(answer.read())
    assert (answer.status, problem["type"]) == expected
    assert problem["request_id"] == answer.headers["x-request-id"] != ""


def test_it_is_ready_and_says_what_it_is_for(server, bundles):
    assert ask(server.port, "GET", "/readyz")[0] == 200
    status, card, _ = ask(server.port, "GET", "/v1/model")
    assert status == 200
    assert bundles["first"].weights_sha256 in json.dumps(card)


def test_requests_are_taken_on_loopback_alone(server):
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    taken = [row[1].split(":") for row in rows if row[3] == "0A"]
    assert {host for host, port in taken if int(port, 16) == server.port} == {"0100007F"}


@pytest.mark.needs("curl")
def test_the_curl_lines_of_the_readme_answer_as_written(server, tmp_path: Path):
    """But for the port, which another program may have."""
    for name in ("photo.jpg", "a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).read_bytes())
    lines = [line for line in README.read_text().splitlines() if line.startswith("curl ")]
    answers = []
    for line in lines:
        command = line.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
        answers.append(json.loads(done.stdout))
    raw, form, as_json = answers
    (result,) = raw["results"]
    assert (result["status"], len(result["faces"])) == ("ok", 1)
    emotion = result["faces"][0]["emotion"]
    assert (len(emotion["top"]), len(emotion["distribution"])) == (5, 14)
    assert [(one["id"], one["status"], one["faces"][0]["alignment"]) for one in form["results"]] == [
        ("0", "ok", "given"),
        ("1", "ok", "given"),
    ]
    assert [(one["id"], one["status"]) for one in as_json["results"]] == [("a", "ok")]


@pytest.mark.parametrize(
    ("more", "part", "code"),
    [
        (["--host", "0.0.0.0"], "lets other machines connect, which needs keys", 2),
        (["engin=torch"], "did you mean 'engine'", 2),
        (["--keys", "/nowhere/keys.json"], "/nowhere/keys.json", 2),
        (["--port", "TAKEN"], "--port TAKEN: another program listens there", 2),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(more, part, code, server, on_s3, on_its_own):
    more, part = [text.replace("TAKEN", str(server.port)) for text in more], part.replace("TAKEN", str(server.port))
    argv = [sys.executable, "-m", "rafce_ray.serve", "--registry", on_s3, "--port", str(free_port()), *more]
    done = subprocess.run(argv, env=on_its_own, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert part in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


# Faults while valid requests are sent.


@pytest.fixture(scope="module")
def expected(bundles, photograph: Path) -> dict[str, np.ndarray]:
    """By version: the probabilities of the photograph's action units."""
    found = {}
    for version, bundle in bundles.items():
        pixels = decode_face(photograph.read_bytes(), bundle.preprocessing.stored_px)
        found[version] = Predictor(bundle).probabilities(pixels[None]).action_units[0]
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
    (faults, _), valid = asyncio.run(
        serve_faults.send_bad_beside_valid(server, corpus, list(corpus.bad_inputs(600)), requests, RATE)
    )
    assert faults == []
    assert {reply.status for reply in valid} == {200}
    assert set(versions_of(valid, expected)) == {"first"}
    assert server.pids("replica") == replicas


def test_another_version_becomes_live_without_a_lost_or_a_mixed_answer(server, on_s3, make_live, requests, expected):
    async def under_load() -> list[Reply]:
        switch = asyncio.create_task(asyncio.to_thread(make_live, on_s3, "second"))
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


def test_the_store_was_busy_meanwhile(s3_door, until):
    """Replicas look at the registry twice a second."""
    until(lambda: s3_door.told()["faults"] > 3)


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


def test_a_signal_ends_it_once_the_photographs_in_work_are_answered(server, said, stats_port, until):
    """SIGTERM is what Kubernetes, systemd and Docker send; Ray takes it for itself, too."""
    photograph = Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).read_bytes()
    request = post("/v1/predict", photograph, "image/jpeg")
    in_work = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(8)]
    for connection in in_work:
        connection.sendall(request[:-1])
    until(lambda: serve_faults.num_in_work(stats_port) == len(in_work))
    processes = [process.pid for process, _ in server.parts()]
    server.process.send_signal(signal.SIGTERM)
    until(lambda: "shutting down" in said.read_text())
    until(lambda: not listens(server.port))
    for connection in in_work:
        connection.sendall(request[-1:])
    answers = []
    for connection in in_work:
        response = http.client.HTTPResponse(connection)
        response.begin()
        answers.append((response.status, len(json.loads(response.read())["results"])))
        connection.close()
    assert answers == [(200, 1)] * len(in_work)
    assert server.process.wait(120) == 0
    assert "every request in work was answered" in said.read_text()
    until(lambda: not any(map(is_alive, processes)))


def test_a_bundle_is_served_without_a_registry(write_bundle, on_its_own, photograph: Path, tmp_path: Path):
    bundle = write_bundle(tmp_path / "bundle")
    one = start_service("--bundle", str(bundle), "--engine", "torch", environment=on_its_own)
    try:
        status, answer, _ = ask(
            one.port, "POST", "/v1/predict?faces=aligned", photograph.read_bytes(), Content_Type="image/png"
        )
    finally:
        one.stop()
    assert status == 200, answer
    assert answer["model"]["sha256"] == load_bundle(bundle).weights_sha256
