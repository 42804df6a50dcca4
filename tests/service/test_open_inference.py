"""Open Inference Protocol v2: the same probabilities, nothing rounded or guessed, and bounds and errors as
everywhere.
"""

import base64

import httpx
import numpy as np
import pytest

from rafce_ray.service.open_inference import InferAnswer, InferModel

INFER = "/v2/models/rafce/infer"


def tensor(images: np.ndarray, datatype: str = "FP32", flat: bool = False) -> dict:
    data = images.astype(float) if datatype == "FP32" else images
    return {
        "name": "images",
        "datatype": datatype,
        "shape": list(images.shape),
        "data": (data.ravel() if flat else data).tolist(),
    }


def encoded(contents: list[bytes]) -> dict:
    data = [base64.b64encode(content).decode() for content in contents]
    return {"name": "image_bytes", "datatype": "BYTES", "shape": [len(data)], "data": data}


def outputs(response: httpx.Response) -> dict[str, np.ndarray]:
    assert response.status_code == 200, response.text
    answer = InferAnswer.model_validate_json(response.content)
    assert all(output.datatype == "FP32" for output in answer.outputs)
    return {output.name: np.array(output.data).reshape(output.shape) for output in answer.outputs}


def error(response: httpx.Response) -> str:
    """What the protocol's error says; it is all that there is in it."""
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    return response.json()["error"]


@pytest.mark.parametrize(("datatype", "flat"), [("FP32", False), ("FP32", True), ("UINT8", False)])
def test_tensors_get_the_probabilities_of_the_model(client, predictor, faces, datatype, flat):
    images = faces(3)
    found = outputs(client.post(INFER, json={"id": "7", "inputs": [tensor(images, datatype, flat)]}))
    expected = predictor.probabilities(images)
    np.testing.assert_allclose(found["emotion_probabilities"], expected.emotion, atol=1e-6)
    np.testing.assert_allclose(found["action_unit_probabilities"], expected.action_units, atol=1e-6)


def test_image_bytes_get_the_same_answer_as_their_pixels(client, faces, encode):
    images = faces(2)
    given = encoded([encode(one) for one in images])
    # One of them as mail programs and browsers write it.
    given["data"][1] = "data:image/png;base64," + base64.encodebytes(encode(images[1])).decode().replace("=", "")
    as_files = outputs(client.post(INFER, json={"inputs": [given]}))
    as_pixels = outputs(client.post(INFER, json={"inputs": [tensor(images)]}))
    for name in as_pixels:
        np.testing.assert_allclose(as_files[name], as_pixels[name], atol=1e-6)


def test_the_answer_says_who_gave_it_and_what_its_columns_are(client, service, faces):
    body = {"id": "7", "inputs": [tensor(faces(1))], "outputs": [{"name": "action_unit_probabilities"}]}
    answer = client.post(INFER, json=body).json()
    assert (answer["model_name"], answer["id"]) == ("rafce", "7")
    assert answer["model_version"] == service.live.served.model.version
    (output,) = answer["outputs"]
    assert (output["shape"], output["parameters"]) == ([1, 3], {"labels": ["AU1", "AU12", "AU25"]})
    assert "id" not in client.post(INFER, json={"inputs": [tensor(faces(1))]}).json()


def changed(images: np.ndarray, value: float) -> dict:
    found = tensor(images, flat=True)
    found["data"][7] = value
    return found


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (lambda one: changed(one, 0.5), 400, "whole numbers of 0 to 255"),
        (lambda one: changed(one, -1), 400, "whole numbers of 0 to 255"),
        (lambda one: changed(one, 256), 400, "whole numbers of 0 to 255"),
        (lambda one: changed(one, "7"), 400, "something else than numbers"),
        (lambda one: changed(one, None), 400, "something else than numbers"),
        (lambda one: changed(one, 10**30), 400, "whole numbers of 0 to 255"),
        (lambda one: {**tensor(one), "shape": [1, 40, 40, 1]}, 400, "(B, 40, 40, 3) is expected"),
        (lambda one: {**tensor(one), "shape": [1, 3, 40, 40]}, 400, "(B, 40, 40, 3) is expected"),
        (lambda one: {**tensor(one), "shape": [2, 40, 40, 3]}, 400, "its shape says [2, 40, 40, 3]"),
        (lambda one: {**tensor(one), "shape": [0, 40, 40, 3]}, 400, "inputs"),
        (lambda one: {**tensor(one), "data": [[1], [1, 2]]}, 400, "unevenly"),
        (lambda one: {**tensor(one), "datatype": "FP64"}, 400, "inputs"),
        (lambda one: {**tensor(one), "datatype": "BYTES"}, 400, "takes FP32 or UINT8"),
        (lambda one: {**tensor(one), "name": "pixels"}, 400, "no input 'pixels'"),
        (lambda one: {**tensor(one), "shape": [99, 40, 40, 3]}, 413, "at most 16"),
        (lambda one: {**encoded([b"x"]), "shape": [2]}, 400, "shape (B)"),
        (lambda one: {**encoded([b"x"]), "data": ["%%%%"]}, 400, "not base64"),
        (lambda one: {**encoded([b"x"]), "data": ["abcde"]}, 400, "cut short"),
        (lambda one: {**encoded([b"x"]), "data": [7]}, 400, "something else than base64"),
        (lambda one: encoded([b"no picture"]), 415, "no JPEG, PNG or WebP"),
        (lambda one: encoded([b""]), 422, "empty"),
    ],
)
def test_what_is_no_face_is_refused_with_the_remedy(client, faces, change, status, words):
    response = client.post(INFER, json={"inputs": [change(faces(1))]})
    assert (response.status_code, words in error(response)) == (status, True), response.text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"inputs": [NaN]}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "InferRequest"),
        (b'{"inputs": []}', "inputs"),
        (b'{"inputs": [1, 2]}', "inputs"),
        (b'{"inputz": []}', "did you mean 'inputs'"),
        (b'{"inputs": [' + b"0," * 100_000 + b"0]}", "more than the 76,800 numbers"),
    ],
)
def test_what_is_no_request_is_refused(client, body, words):
    response = client.post(INFER, content=body)
    assert response.status_code in (400, 413)
    assert words in error(response)


def test_only_the_model_that_is_served_answers(client, service, faces):
    version = service.live.served.model.version
    body = {"inputs": [tensor(faces(1))]}
    assert client.post(f"/v2/models/rafce/versions/{version}/infer", json=body).status_code == 200
    for path in ("/v2/models/other", "/v2/models/rafce/versions/7", "/v2/models/other/ready"):
        assert client.get(path).status_code == 404
        assert "not served" in error(client.get(path)) or "no model" in error(client.get(path))
    assert client.post("/v2/models/other/infer", json=body).status_code == 404
    wanted = {**body, "outputs": [{"name": "logits"}]}
    assert "no output 'logits'" in error(client.post(INFER, json=wanted))


def test_health_and_metadata(client):
    assert client.get("/v2").json()["name"] == "rafce_ray"
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/rafce/ready").json() == {"ready": True}
    model = InferModel.model_validate_json(client.get("/v2/models/rafce").content)
    assert [(one.name, one.shape) for one in model.inputs] == [("images", (-1, 40, 40, 3)), ("image_bytes", (-1,))]
    assert [(one.name, one.shape) for one in model.outputs] == [
        ("emotion_probabilities", (-1, 4)),
        ("action_unit_probabilities", (-1, 3)),
    ]


def test_it_is_bounded_like_everything_else(service, client, faces, monkeypatch):
    monkeypatch.setattr(service.admission, "max_requests", 0)
    response = client.post(INFER, json={"inputs": [tensor(faces(1))]})
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert "places are taken" in error(response)
    monkeypatch.undo()
    monkeypatch.setattr(service.batcher, "is_alive", lambda: False)
    assert client.get("/v2/health/live").status_code == 503
    assert client.get("/v2/health/ready").status_code == 503
