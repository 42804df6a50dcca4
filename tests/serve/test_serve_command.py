"""`rafce serve` as a user runs it: from the command to the answer of a photograph, to its end; and what it refuses."""

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from http_load import form
from matplotlib import cbook
from prometheus_client.parser import text_string_to_metric_families
from serving import free_port

from rafce_ray.bundle import load_bundle
from rafce_ray.predict import Predictor, load_file, predict_files

pytestmark = pytest.mark.ray

README = Path(__file__).parents[2] / "README.md"


def environment() -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    return {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | own


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
def served(serve_bundle, said) -> Iterator[tuple[int, subprocess.Popen]]:
    port = free_port()
    argv = [
        sys.executable,
        "-m",
        "rafce_ray.serve",
        "--bundle",
        str(serve_bundle),
        "--port",
        str(port),
        "--engine",
        "torch",
    ]
    with said.open("w") as stderr:
        process = subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=stderr, text=True)
    line = process.stdout.readline()
    assert line.strip() == f"http://127.0.0.1:{port}", said.read_text()
    yield port, process
    if process.poll() is None:
        process.terminate()
        process.wait(60)
    process.stdout.close()


Series = dict[tuple[str, frozenset], float]


@pytest.fixture(scope="module")
def scrape(served, said: Path) -> Callable[[], Series]:
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


def test_the_dashboard_shows_the_service_by_its_name(served, said: Path):
    (address,) = re.findall(r"dashboard: (http://127\.0\.0\.1:\d+)/#/serve", said.read_text())
    with urllib.request.urlopen(f"{address}/api/serve/applications/", timeout=30) as answer:
        (application,) = json.loads(answer.read())["applications"].values()
    assert (application["name"], application["status"]) == ("rafce", "RUNNING")


def test_a_scrape_has_every_watched_metric_and_counts_what_was_sent(served, scrape, watched_names, photograph: Path):
    """Before all that send something, so that nothing else is counted meanwhile."""
    port, _ = served
    deadline = time.monotonic() + 60
    while not named(before := scrape(), "requests_total") and time.monotonic() < deadline:
        time.sleep(0.5)
    # What is not known yet is absent, since Ray exports no NaN, and what has not happened yet is there as 0.
    assert named(before, "drift_psi") == []
    assert named(before, "requests_total", route="/v1/predict", status="500") == [0]
    image = photograph.read_bytes()
    body, kind = form(*[image] * 14, options=[("faces", "aligned")])
    for _ in range(25):
        assert ask(port, "POST", "/v1/predict", body, Content_Type=kind)[0] == 200
    for _ in range(3):
        assert ask(port, "POST", "/v1/predict", b"GIF89a", Content_Type="image/png")[0] == 415
    expected = {
        ("requests_total", ("route", "/v1/predict"), ("status", "200")): 25,
        ("requests_total", ("route", "/v1/predict"), ("status", "415")): 3,
        ("request_ms_count", ("route", "/v1/predict")): 28,
        ("request_ms_bucket", ("route", "/v1/predict"), ("le", "+Inf")): 28,
        ("rejected_total",): 3,
        ("rejected_total", ("reason", "unsupported_format")): 3,
        ("image_rejected_total", ("reason", "unsupported_format")): 3,
        ("no_face_total",): 0,
        ("decode_ms_count",): 25,
        ("queue_ms_bucket", ("le", "+Inf")): 25,
        ("infer_ms_count",): 25,
        ("faces_total",): 350,
        ("prediction_total",): 350,
        ("confidence_count",): 350,
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
    assert total(now, "drift_psi", statistic="emotion") > 1
    assert total(now, "drift_reference_images") == 1200
    assert total(now, "model_info") == 1


def test_a_face_gets_the_answer_of_rafce_predict(served, serve_bundle, photograph: Path):
    port, _ = served
    status, answer, headers = ask(
        port, "POST", "/v1/predict?faces=aligned", photograph.read_bytes(), Content_Type="image/png"
    )
    assert status == 200, answer
    bundle = load_bundle(serve_bundle)
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
    assert answer["model"]["sha256"] == bundle.weights_sha256
    assert headers["cache-control"] == "no-store"


def test_refusals_come_through_as_the_service_gives_them(served):
    port, _ = served
    status, problem, headers = ask(
        port, "POST", "/v1/predict", b"GIF89a", Content_Type="image/png", x_request_id="mine"
    )
    assert (status, problem["type"], problem["request_id"]) == (415, "/problems/unsupported_format", "mine")
    assert headers["content-type"] == "application/problem+json"
    assert headers["x-request-id"] == "mine"
    status, problem, _ = ask(port, "GET", "/nowhere")
    assert (status, problem["type"]) == (404, "/problems/not_found")


def test_it_is_ready_and_says_what_it_is_for(served, serve_bundle):
    port, _ = served
    assert ask(port, "GET", "/readyz")[0] == 200
    status, card, _ = ask(port, "GET", "/v1/model")
    assert status == 200
    assert load_bundle(serve_bundle).weights_sha256 in json.dumps(card)


def test_requests_are_taken_on_loopback_alone(served):
    port, _ = served
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}
    assert listening == {"0100007F"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="README's examples are for curl, which is not installed")
def test_the_curl_lines_of_the_readme_answer_as_written(served, tmp_path: Path):
    """But for the port, which another program may have."""
    port, _ = served
    for name in ("photo.jpg", "a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).read_bytes())
    lines = [line for line in README.read_text().splitlines() if line.startswith("curl ")]
    answers = []
    for line in lines:
        command = line.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
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
    ("more", "part"),
    [
        (["--host", "0.0.0.0"], "lets other machines ask, which needs keys"),
        (["engin=torch"], "did you mean 'engine'"),
        (["--keys", "/nowhere/keys.json"], "/nowhere/keys.json"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(more, part, serve_bundle):
    argv = [sys.executable, "-m", "rafce_ray.serve", "--bundle", str(serve_bundle), "--port", str(free_port()), *more]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (1, 2)
    assert part in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_told_and_a_signal_ends_it(served, serve_bundle):
    port, process = served
    argv = [sys.executable, "-m", "rafce_ray.serve", "--bundle", str(serve_bundle), "--port", str(port)]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert f"--port {port}: another program listens there" in " ".join(done.stderr.split())
    # Ray takes this one for itself; Ctrl-C's it leaves alone.
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
