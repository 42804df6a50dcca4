"""The application over real connections: routes, forms of requests, deadline, readiness, what the model tells of
itself.
"""

import asyncio
import base64
import html
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import urldefrag, urljoin

import httpx
import numpy as np
import pytest
from openapi_spec_validator import validate
from pydantic import TypeAdapter

from rafce_ray.config import apply_overrides
from rafce_ray.metrics.calibration import Outputs
from rafce_ray.service import state as state_module
from rafce_ray.service.answers import NoImageRead, PredictAnswer
from rafce_ray.service.config import read_service_config
from rafce_ray.service.documents import openapi_document
from rafce_ray.service.keys import new_key
from rafce_ray.service.live import FailedSwap
from rafce_ray.service.model_info import ModelInfo
from rafce_ray.service.problems import PROBLEM_TYPES, ProblemDocument
from rafce_ray.service.requests import PredictRequest
from rafce_ray.service.state import FRESH_S, Service

PNG = {"content-type": "image/png"}
ANSWER = TypeAdapter(PredictAnswer)


@pytest.fixture(scope="module")
def face(faces, encode) -> bytes:
    return encode(faces(1)[0])


def problem(response: httpx.Response) -> str:
    """The code of an answer that is a problem, after a look at its form."""
    assert response.headers["content-type"] == "application/problem+json"
    several = response.json()["type"] == "/problems/no_image_read"
    document = TypeAdapter(NoImageRead if several else ProblemDocument).validate_json(response.content)
    assert document["status"] == response.status_code
    assert document["request_id"] == response.headers["x-request-id"]
    return document["type"].removeprefix("/problems/")


class Slow:
    """A predictor that answers when it is let go."""

    def __init__(self, predictor) -> None:
        self.bundle, self.engine, self.named = predictor.bundle, predictor.engine, predictor.named
        self._predictor = predictor
        self.began, self.go = threading.Event(), threading.Event()

    def outputs(self, images: np.ndarray) -> Outputs:
        self.began.set()
        assert self.go.wait(20)
        return self._predictor.outputs(images)


@pytest.fixture
def slow(service) -> Slow:
    """The service's model, held until it is let go."""
    served = service.live.served
    slow = Slow(served.predictor)
    service.live.served = replace(served, predictor=slow)
    yield slow
    slow.go.set()
    service.live.served = served


def test_every_form_of_request_gets_the_same_answer(client, face):
    raw = client.post("/v1/predict?faces=aligned", content=face, headers=PNG).json()
    encoded = base64.b64encode(face).decode()
    images = [{"id": "a", "data": encoded}, {"data": f"data:image/png;base64,{encoded}"}]
    as_json = client.post("/v1/predict", json={"images": images, "options": {"faces": "aligned"}}).json()
    form = client.post(
        "/v1/predict", files=[("files", ("x.png", face)), ("files", ("y.png", face))], data={"faces": "aligned"}
    )
    found = [*raw["results"], *as_json["results"], *form.json()["results"]]
    assert [one["id"] for one in found] == ["0", "a", "1", "0", "1"]
    expected = found[0]["faces"][0]
    for one in found[1:]:
        (other,) = one["faces"]
        assert other["box"] == {"x": 0, "y": 0, "width": 40, "height": 40}
        assert other["emotion"]["label"] == expected["emotion"]["label"]
        assert probabilities(other) == pytest.approx(probabilities(expected), abs=1e-6)


def probabilities(face: dict) -> list[float]:
    return [one["probability"] for one in (*face["emotion"]["top"], *face["action_units"])]


def test_answers_fit_their_schema(client, face):
    bad = ("files", ("y.png", b"no picture"))
    requests = [
        client.post("/v1/predict?faces=aligned", content=face, headers=PNG),
        client.post("/v1/predict?faces=aligned&return_distribution=true&top_k=4", content=face, headers=PNG),
        client.post("/v1/predict", files=[("files", ("x.png", face)), bad], data={"faces": "aligned"}),
    ]
    for response in requests:
        assert response.status_code == 200, response.text
        answer = ANSWER.validate_json(response.content)
        # Nothing of the answer was left out of the schema, and the schema promises nothing that is not there.
        assert json.loads(ANSWER.dump_json(answer)) == response.json()
        assert answer.request_id == response.headers["x-request-id"]
        assert answer.timings.total_ms >= answer.timings.decode_ms
    with_distribution = ANSWER.validate_json(requests[1].content).results[0].faces[0].emotion
    assert len(with_distribution.distribution) == len(with_distribution.top) == 4


def test_a_bad_image_fails_nobody_else_and_alone_is_the_response(client, face):
    files = [("files", ("a.png", face)), ("files", ("b.png", face[:100])), ("files", ("c.png", face))]
    answer = client.post("/v1/predict", files=files, data={"faces": "aligned"})
    assert answer.status_code == 200
    assert [one["status"] for one in answer.json()["results"]] == ["ok", "error", "ok"]
    error = TypeAdapter(ProblemDocument).validate_python(answer.json()["results"][1]["error"])
    assert (error["type"], error["status"]) == ("/problems/undecodable", 422)
    assert problem(client.post("/v1/predict", content=face[:100], headers=PNG)) == "undecodable"
    assert problem(client.post("/v1/predict", content=b"GIF89a", headers=PNG)) == "unsupported_format"
    assert problem(client.post("/v1/predict", content=face, headers=PNG)) == "no_face"


def test_images_that_are_all_bad_refuse_the_request_and_each_says_why(client, face):
    answer = client.post("/v1/predict", files=[("files", ("a.png", b"1")), ("files", ("b.png", face[:100]))])
    assert (answer.status_code, problem(answer)) == (422, "no_image_read")
    results = answer.json()["results"]
    assert [one["id"] for one in results] == ["0", "1"]
    assert [one["error"]["type"] for one in results] == ["/problems/unsupported_format", "/problems/undecodable"]
    assert problem(client.post("/v1/predict", files={"files": ("a.png", b"1")})) == "unsupported_format"
    assert problem(client.post("/v1/predict", json={"images": [{"data": "*"}]})) == "bad_base64"


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/v1/predict", "method_not_allowed"),
        ("HEAD", "/v1/predict", None),
        ("PUT", "/v1/predict", "method_not_allowed"),
        ("OPTIONS", "/v1/nothing", "not_found"),
        ("POST", "/healthz", "method_not_allowed"),
        ("POST", "/v1/predict/", "not_found"),
        ("GET", "/v1/predictions", "not_found"),
        ("GET", "/page.css/../../app.py", "not_found"),
        ("GET", "/problems/none", "not_found"),
    ],
)
def test_wrong_methods_and_paths_are_problems(client, method, path, code):
    response = client.request(method, path)
    if code is None:
        assert (response.status_code, response.content) == (405, b"")
    else:
        assert problem(response) == code
    if response.status_code == 405:
        assert response.headers["allow"]


def test_the_nearest_path_is_told(client):
    for path, known in [("/v1/predict/", "/v1/predict"), ("/predict", "/v1/predict"), ("/V1/model", "/v1/model")]:
        assert client.post(path).json()["hint"].startswith(f"Did you mean {known!r}? See /docs")


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/model", "/docs", "/openapi.json", "/docs.css"])
def test_head_is_get_without_a_body(client, path):
    get, head = client.get(path), client.head(path)
    assert (get.status_code, head.status_code) == (200, 200)
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]


def test_every_path_answers_options_and_a_wrong_method(client):
    paths = client.get("/openapi.json").json()["paths"]
    others = [
        "/",
        "/docs",
        "/page.js",
        "/problems/no_face",
        "/v2",
        "/v2/health/live",
        "/v2/models/rafce/versions/1/infer",
    ]
    for path in (*paths, *others):
        path = path.replace("{model}", "rafce")
        options, wrong = client.options(path), client.request("PATCH", path)
        assert (options.status_code, options.content, problem(wrong)) == (204, b"", "method_not_allowed")
        allowed = options.headers["allow"].split(", ")
        assert "OPTIONS" in allowed
        assert ("HEAD" in allowed) == ("GET" in allowed)
        assert wrong.headers["allow"] == options.headers["allow"]


def test_behind_a_proxy_that_keeps_host_and_origin_a_key_is_enough(client, bundle_path, serving, face, tmp_path):
    proxied = {"host": "faces.example", "origin": "https://faces.example"}
    # Without keys it could be a name that a page of another site gave to this machine (DNS rebinding).
    assert problem(client.post("/v1/predict?faces=aligned", content=face, headers=PNG | proxied)) == "cross_site"
    key = new_key(tmp_path / "keys.json", "test", frozenset(("predict",)))
    config = {"bundle": str(bundle_path), "engine": "torch", "keys_file": str(tmp_path / "keys.json")}
    service = Service(read_service_config(config | {"allow_origins": ["https://app.example"]}))
    with serving(service) as client:
        assert client.get("/", headers=proxied).status_code == 200
        for scheme in ("Bearer", "bearer", "BEARER "):
            headers = PNG | proxied | {"authorization": f"{scheme} {key}"}
            assert client.post("/v1/predict?faces=aligned", content=face, headers=headers).status_code == 200
        # Before a page may send its key, the browser asks without one.
        headers = {"origin": "https://app.example", "access-control-request-method": "POST"}
        found = client.options("/v1/predict", headers=headers)
        assert (found.status_code, found.headers["access-control-allow-origin"]) == (204, "https://app.example")
        found = client.post("/v1/predict", content=face, headers=PNG | {"origin": "https://app.example"})
        assert (problem(found), found.headers["access-control-allow-origin"]) == ("key_needed", "https://app.example")
    service.close()


def test_faces_of_many_clients_at_once_keep_apart(client, predictor, faces, encode):
    images = faces(24, seed=9)
    expected = predictor.probabilities(images).emotion

    def ask(index: int) -> float:
        answer = client.post(
            "/v1/predict?faces=aligned&return_distribution=true", content=encode(images[index]), headers=PNG
        ).json()
        found = [one["probability"] for one in answer["results"][0]["faces"][0]["emotion"]["distribution"]]
        return float(np.abs(np.array(found) - expected[index]).max())

    assert np.ptp(expected, axis=0).max() > 1e-3
    with ThreadPoolExecutor(12) as pool:
        assert max(pool.map(ask, range(24))) < 1e-6


def test_who_waits_too_long_is_told_and_no_header_helps(bundle_path, serving, face, predictor):
    service = Service(
        read_service_config(
            {"bundle": str(bundle_path), "engine": "torch", "limits": {"deadline_s": 0.2, "max_requests": 2}}
        )
    )
    slow = Slow(predictor)
    service.live.served = replace(service.live.served, predictor=slow)
    headers = {**PNG, "x-request-timeout-seconds": "0", "x-request-disconnect-disabled": "?1", "x-request-id": "mine"}
    with serving(service) as client:
        response = client.post("/v1/predict?faces=aligned", content=face, headers=headers)
        assert (problem(response), response.status_code) == ("deadline", 504)
        assert response.headers["x-request-id"] == "mine"
        alone = response.json()
        form = {"files": [("files", ("a.png", face))] * 2, "data": {"faces": "aligned"}}
        together = client.post("/v1/predict", **form).json()
        tensor = {"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(face).decode()]}
        inferred = client.post("/v2/models/rafce/infer", json={"inputs": [tensor]})
        assert inferred.status_code == 504
        hints = [alone["hint"], together["hint"], inferred.json()["error"]]
        for hint, remedy in zip(hints, ("a smaller picture", "fewer pictures", "smaller or fewer"), strict=True):
            assert f"Send {remedy}" in hint
            assert alone["detail"] == "The answer was not ready within 0.2 s."
            # The remedy is an argument that the command takes.
            (longer,) = re.findall(r"limits\.deadline_s=\S+", hint)
            values = apply_overrides(service.config.model_dump(), [longer])
            assert read_service_config(values).limits.deadline_s == 0.4
        # Its place is free again, though the batch still runs.
        assert service.admission.num_requests == 0
        slow.go.set()
    service.close()


def test_beyond_the_bound_it_is_429_at_once_and_who_leaves_makes_room(bundle_path, serving, face, predictor):
    config = {"bundle": str(bundle_path), "engine": "torch", "limits": {"max_requests": 3}}
    service = Service(read_service_config(config))
    slow = Slow(predictor)
    service.live.served = replace(service.live.served, predictor=slow)

    async def scenario(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:

            def ask() -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(client.post("/v1/predict?faces=aligned", content=face, headers=PNG))

            waiting = [ask() for _ in range(3)]
            while service.admission.num_requests < 3:
                await asyncio.sleep(0.005)
            refused = await ask()
            assert problem(refused) == "busy"
            assert refused.headers["retry-after"] == "1"
            waiting[0].cancel()
            while service.admission.num_requests == 3:
                await asyncio.sleep(0.005)
            last = ask()
            while service.admission.num_requests < 3:
                await asyncio.sleep(0.005)
            slow.go.set()
            assert [(await one).status_code for one in (*waiting[1:], last)] == [200, 200, 200]
        assert service.admission.num_requests == 0

    with serving(service) as client:
        asyncio.run(scenario(str(client.base_url)))
    service.close()


def test_a_request_is_answered_by_the_model_that_it_was_admitted_with(
    service, client, slow, face, write_bundle, tmp_path
):
    other = replace(
        service.live.served, model=replace(service.live.served.model, version="other"), predictor=slow._predictor
    )
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/predict?faces=aligned", content=face, headers=PNG)
        assert slow.began.wait(10)
        before = service.live.served.model.version
        service.live.served = other
        slow.go.set()
        assert first.result().json()["model"]["version"] == before != "other"
    assert client.post("/v1/predict?faces=aligned", content=face, headers=PNG).json()["model"]["version"] == "other"


def test_an_engine_that_breaks_is_a_500_without_a_word_of_why(service, client, slow, face, monkeypatch):
    def broken(images: np.ndarray) -> Outputs:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(slow, "outputs", broken)
    response = client.post("/v1/predict?faces=aligned", content=face, headers=PNG)
    assert problem(response) == "internal_error"
    assert "secret" not in response.text


def test_it_is_ready_when_the_canary_gives_its_answer_and_not_otherwise(service, client, slow, monkeypatch):
    monkeypatch.setattr("rafce_ray.service.state.FRESH_S", 0.0)
    slow.go.set()
    assert client.get("/readyz").json()["model"]["sha256"] == service.live.served.model.sha256
    right = slow.outputs

    def slightly_off(images: np.ndarray) -> Outputs:
        found = right(images)
        return Outputs(found.emotion + np.eye(1, found.emotion.shape[1], dtype=np.float32), found.action_units)

    def nan(images: np.ndarray) -> Outputs:
        found = right(images)
        return Outputs(found.emotion * np.float32(np.nan), found.action_units)

    for wrong, word in ((slightly_off, "off by"), (nan, "not finite")):
        monkeypatch.setattr(slow, "outputs", wrong)
        response = client.get("/readyz")
        assert (problem(response), response.status_code) == ("not_ready", 503)
        assert word in response.json()["detail"]
        assert client.get("/healthz").status_code == 200
    monkeypatch.setattr(slow, "outputs", right)
    assert client.get("/readyz").status_code == 200


def test_a_hung_batch_is_ill(service, client, slow, face, monkeypatch):
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.post, "/v1/predict?faces=aligned", content=face, headers=PNG)
        assert slow.began.wait(10)
        assert service.is_healthy()
        monkeypatch.setattr(state_module, "HUNG_S", 0.0)
        time.sleep(0.01)
        assert not service.is_healthy()
        assert problem(client.get("/healthz")) == "not_ready"
        slow.go.set()
        assert asked.result().status_code == 200
    monkeypatch.undo()
    assert service.is_healthy()


def test_the_model_tells_what_it_is_and_is_not_for(service, client, predictor, bundle_path):
    response = client.get("/v1/model")
    info = ModelInfo.model_validate_json(response.content)
    assert info.model.sha256 == predictor.bundle.weights_sha256
    assert [one.label for one in info.taxonomy.emotions] == list(predictor.bundle.taxonomy.emotions)
    assert info.taxonomy.emotions[0].components == ("happy", "surprised")
    assert [(one.code, one.name, one.threshold) for one in info.taxonomy.action_units] == [
        ("AU1", "Inner brow raiser", 0.25),
        ("AU12", "Lip corner puller", 0.5),
        ("AU25", "Lips part", 0.75),
    ]
    assert "perceived" in info.meaning
    assert any("Article 5(1)(f)" in one for one in info.prohibited_use)
    assert any("Article 50(3)" in one for one in info.prohibited_use)
    assert info.limits.max_images == service.config.limits.max_images
    assert info.model_card == "# Model card: a test"
    assert str(bundle_path) not in response.text


def test_a_refused_model_is_told_without_the_servers_paths(service, client, monkeypatch):
    failed = FailedSwap("7", "/secret/place", "/secret/place: was altered", service.live.served.since)
    monkeypatch.setattr(service.live, "failed", failed)
    response = client.get("/v1/model")
    assert ModelInfo.model_validate_json(response.content).refused.version == "7"
    assert "secret" not in response.text


def test_the_openapi_document_is_valid_and_names_every_problem(client, service):
    document = client.get("/openapi.json").json()
    validate(document)
    assert document == json.loads(json.dumps(openapi_document(service.config)))
    answers = document["paths"]["/v1/predict"]["post"]["responses"]
    told = {
        code
        for response in answers.values()
        for media in response["content"].values()
        for code in media.get("examples", {})
    }
    elsewhere = {"not_found", "method_not_allowed", "unknown_method", "not_ready", "scope_missing", "client_gone"}
    elsewhere |= {"change_refused", "no_such_version"}
    assert told == PROBLEM_TYPES.keys() - elsewhere
    assert set(document["paths"]["/v1/predict"]["post"]["requestBody"]["content"]) == {
        "image/jpeg",
        "image/png",
        "image/webp",
        "application/json",
        "multipart/form-data",
    }


def test_the_examples_fit_the_schema(client):
    predict = client.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]
    answer, request = predict["responses"]["200"], predict["requestBody"]
    ANSWER.validate_json(json.dumps(answer["content"]["application/json"]["example"]))
    TypeAdapter(PredictRequest).validate_json(json.dumps(request["content"]["application/json"]["example"]))


def test_keys_are_asked_for_where_there_are_any():
    with_keys = openapi_document(read_service_config({"bundle": "b", "keys_file": "keys.json"}))
    validate(json.loads(json.dumps(with_keys)))
    assert with_keys["paths"]["/v1/predict"]["post"]["security"] == [{"key": []}]


def test_the_documentation_shows_everything_and_loads_nothing_from_elsewhere(client):
    page = client.get("/docs").text
    document = client.get("/openapi.json").json()
    for text in (*document["paths"], *document["components"]["schemas"], *PROBLEM_TYPES):
        assert text in page
    for part in ('src="http', 'href="http', "@import", "<script", "<style", "style="):
        assert part not in page
    ids = {chunk.split('"')[0] for chunk in page.split(' id="')[1:]}
    links = {chunk.split('"')[0] for chunk in page.split('href="#')[1:]}
    assert links <= ids


class Links(HTMLParser):
    """What the attributes href and src of a page name."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found |= {value for name, value in attributes if name in ("href", "src") and value is not None}


def test_every_address_on_every_page_holds_below_a_prefix(client):
    """A proxy may show the service at another path than ``/``."""
    prefix = "http://proxy.example/faces/"
    seen, left = set(), {prefix}
    while left:
        url = left.pop()
        assert url.startswith(prefix)
        seen.add(url)
        answer = client.get(f"/{url.removeprefix(prefix)}")
        assert answer.status_code == 200, url
        if answer.headers["content-type"].startswith("text/html"):
            links = {urldefrag(urljoin(url, link)).url for link in Links(answer.text).found}
            left |= links - seen
    known = {"", "docs", "docs.css", "page.css", "page.js", "icon.svg", "openapi.json", "v1/model"}
    assert seen == {prefix + path for path in known | {kind.uri[1:] for kind in PROBLEM_TYPES.values()}}
    (server,) = client.get("/openapi.json").json()["servers"]
    assert urljoin(f"{prefix}openapi.json", server["url"]) == prefix


def test_every_problem_has_its_page(client):
    for kind in PROBLEM_TYPES.values():
        page = client.get(kind.uri)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert html.escape(kind.title) in page.text.replace("&#39;", "&#x27;")


def test_a_canary_that_was_asked_a_moment_ago_is_not_asked_again(service, client, slow):
    assert FRESH_S > 0.5
    slow.go.set()
    assert client.get("/readyz").status_code == 200
    slow.began.clear()
    assert client.get("/readyz").status_code == 200
    assert not slow.began.is_set()
