"""What is counted, by hand and on the application: every request, image and face once, under its own labels."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from rafce_ray.service.config import read_service_config
from rafce_ray.service.live import BLOCK_FACES
from rafce_ray.service.meter import Meter
from rafce_ray.service.state import Service


def values(meter: Meter, name: str, label: str | None = None) -> dict[str | None, float]:
    """Of the samples of this name: the value by one label, or by None."""
    return {
        None if label is None else sample.labels[label]: sample.value
        for family in meter.registry.collect()
        for sample in family.samples
        if sample.name == f"rafce_serve_{name}"
    }


def test_what_has_not_happened_yet_is_there_as_0():
    meter = Meter()
    meter.count_request("/v1/predict", 429, 2.0, "busy")
    requests = values(meter, "requests_total", "status")
    assert requests == {"200": 0, "429": 1, "500": 0, "503": 0, "504": 0}
    rejected = values(meter, "rejected_total", "reason")
    assert {code for code, number in rejected.items() if number} == {"busy"}
    assert rejected["deadline"] == 0
    buckets = values(meter, "request_ms_bucket", "le")
    assert (buckets["1.0"], buckets["2.0"], buckets["+Inf"]) == (0, 1, 1)


def test_every_instrument_has_a_name_of_its_own_and_a_description():
    families = list(Meter().registry.collect())
    names = [family.name for family in families]
    assert len(set(names)) == len(names) == 20
    assert all(name.startswith("rafce_serve_") for name in names)
    assert all(family.documentation.endswith(".") for family in families)


def test_another_model_takes_over_the_gauges():
    meter = Meter()
    meter.tell_model("1", "aa", "torch")
    meter.tell_drift({"emotion": 0.3, "AU1": 0.1}, 200, 900)
    meter.tell_model("2", "bb", "torch")
    meter.tell_drift({"emotion": 0.01}, 0, 0)
    assert values(meter, "model_info", "version") == {"1": 0, "2": 1}
    psi = values(meter, "drift_psi", "statistic")
    assert psi["emotion"] == 0.01
    assert math.isnan(psi["AU1"])


def snapshot(service: Service) -> dict[tuple[str, ...], float]:
    """Name and labels of every series -> its value, or the number of values of a histogram."""
    return {
        (sample.name.removeprefix("rafce_serve_").removesuffix("_count"), *sample.labels.values()): sample.value
        for family in service.measured().registry.collect()
        for sample in family.samples
        if not sample.name.endswith(("_created", "_bucket", "_sum"))
    }


@pytest.fixture
def changes(service) -> Callable[[], dict[tuple[str, ...], float]]:
    """``changes()``: what has been counted since the test began."""
    before = snapshot(service)
    return lambda: {
        key: value - before.get(key, 0)
        for key, value in snapshot(service).items()
        if value != before.get(key, 0) and not math.isnan(value)
    }


def test_a_photograph_that_is_answered(client, changes, faces, encode, predictor):
    (pixels,) = faces(1)
    answer = client.post("/v1/predict?faces=aligned", content=encode(pixels), headers={"content-type": "image/png"})
    (face,) = answer.json()["results"][0]["faces"]
    units = {("au_positive_total", unit["code"]): 1 for unit in face["action_units"] if unit["active"]}
    unsure = {("unsure_total",): 1} if face["emotion"]["unsure"] else {}
    once = ("decode_ms", "queue_ms", "infer_ms", "batch_faces", "faces_total", "confidence")
    expected = {
        ("requests_total", "/v1/predict", "200"): 1,
        ("request_ms", "/v1/predict"): 1,
        ("prediction_total", face["emotion"]["label"]): 1,
        **units,
        **unsure,
        **{(name,): 1 for name in once},
    }
    assert changes() == expected


def test_an_image_among_others_that_cannot_be_read(client, changes, faces, encode):
    good = [("files", (f"{number}.png", encode(pixels))) for number, pixels in enumerate(faces(3))]
    blank = encode(np.full((300, 300, 3), 127, np.uint8))
    files = [*good, ("files", ("bad.png", b"GIF89a"))]
    assert client.post("/v1/predict", files=files, data={"faces": "aligned"}).status_code == 200
    assert client.post("/v1/predict", content=blank, headers={"content-type": "image/png"}).status_code == 422
    found = changes()
    assert found[("requests_total", "/v1/predict", "200")] == 1
    assert found[("requests_total", "/v1/predict", "422")] == 1
    assert found[("faces_total",)] == found[("confidence",)] == 3
    assert found[("batch_faces",)] == found[("infer_ms",)] == 1
    assert found[("image_rejected_total", "unsupported_format")] == found[("image_rejected_total", "no_face")] == 1
    assert found[("no_face_total",)] == found[("rejected_total", "no_face")] == 1
    assert sum(value for key, value in found.items() if key[0] == "prediction_total") == 3


def test_refusals_by_reason_and_route(client, changes):
    client.get("/nowhere")
    client.get("/v1/predict")
    client.post("/v1/predict", content=b"", headers={"content-type": "image/png"})
    client.post("/v1/predict", content=b"{}", headers={"content-type": "application/json"})
    client.get("/v2/models/other")
    client.get("/healthz")
    found = changes()
    requests = {key[1:]: value for key, value in found.items() if key[0] == "requests_total"}
    assert requests == {
        ("none", "404"): 1,
        ("/v1/predict", "405"): 1,
        ("/v1/predict", "400"): 1,
        ("/v1/predict", "422"): 1,
        ("/v2/models/{model}", "404"): 1,
        ("/healthz", "200"): 1,
    }
    rejected = {key[1]: value for key, value in found.items() if key[0] == "rejected_total"}
    assert (rejected["not_found"], rejected["method_not_allowed"], sum(rejected.values())) == (2, 1, 5)
    assert sum(value for key, value in found.items() if key[0] == "request_ms") == 6


def test_tensors_count_as_faces_do(client, changes, faces, predictor):
    pixels = faces(2)
    given = {"name": "images", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}
    assert client.post("/v2/models/rafce/infer", json={"inputs": [given]}).status_code == 200
    found = changes()
    labels = [prediction.emotion.label for prediction in predictor.predict(pixels)]
    assert {key[1]: value for key, value in found.items() if key[0] == "prediction_total"} == {
        label: labels.count(label) for label in labels
    }
    assert found[("faces_total",)] == 2
    assert found[("requests_total", "/v2/models/{model}/infer", "200")] == found[("decode_ms",)] == 1


def test_the_canary_is_no_face_of_anybody(client, changes):
    assert client.get("/readyz").status_code == 200
    found = changes()
    assert {key[0] for key in found} <= {"requests_total", "request_ms", "batch_faces"}
    assert found[("requests_total", "/readyz", "200")] == 1


def test_drift_is_measured_and_the_model_tells_that_it_can_be(
    write_bundle, serving, tmp_path, faces, encode, even_reference
):
    bundle = write_bundle(tmp_path / "bundle", drift_reference=even_reference(4, 3))
    service = Service(read_service_config({"bundle": str(bundle), "engine": "torch", "watch_s": 60}))
    (pixels,) = faces(1)
    files = [("files", (f"{number}.png", encode(pixels))) for number in range(10)]
    try:
        with serving(service) as client:
            told = client.get("/v1/model").json()["drift"]
            assert (told["watched"], told["remark"], told["reference_images"]) == (True, None, 1200)
            assert {one["name"]: one["min_faces"] for one in told["statistics"]}["emotion"] == 200
            for number in range(20):
                assert math.isnan(values(service.measured(), "drift_psi", "statistic")["emotion"]), number
                assert client.post("/v1/predict", files=files, data={"faces": "aligned"}).status_code == 200
            meter = service.measured()
    finally:
        service.close()
    assert values(meter, "drift_faces") == {None: 200}
    assert 4 * BLOCK_FACES == 200
    # Always the same face, where a quarter of each class is expected: 200.5 of 202 against 300.5 of 1202.
    p, q, rest = 300.5 / 1202, 200.5 / 202, 0.5 / 202
    by_hand = (q - p) * math.log(q / p) + 3 * (rest - p) * math.log(rest / p)
    assert values(meter, "drift_psi", "statistic")["emotion"] == pytest.approx(by_hand)
    assert values(meter, "drift_reference_images") == {None: 1200}


def test_an_old_bundle_says_that_drift_is_unknown(service, client, caplog):
    told = client.get("/v1/model").json()["drift"]
    assert (told["watched"], told["reference_images"], told["statistics"]) == (False, 0, [])
    assert "keeps no reference" in told["remark"]
    assert json.dumps(told)
    assert values(service.measured(), "drift_psi", "statistic") == {}
