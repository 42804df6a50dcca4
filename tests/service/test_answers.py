"""Parity: a picture's answer is that of ``rafce predict``, whatever file it comes in and whoever comes with it."""

import base64
import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from matplotlib import cbook
from PIL import Image

from rafce_ray.base.console import to_json as standard_json
from rafce_ray.bundle.model import Predictor, predict_files
from rafce_ray.faces.detect import build_face_finder
from rafce_ray.faces.files import load_file
from rafce_ray.service.answers import distribution_of, face_answer, to_json

ORIENTATION = 0x0112
TURNED_BACK = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""By EXIF orientation, how the upright picture lies in its file: the inverse of what a viewer does with it."""


@pytest.fixture(scope="module")
def photograph() -> Path:
    """A photograph of one person (Grace Hopper, in the public domain) that comes with matplotlib."""
    return Path(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))


@pytest.fixture(scope="module")
def face(photograph: Path) -> Image.Image:
    """Her face as an aligned picture of 120 px, smooth as JPEG likes it."""
    found = load_file(photograph, finder=build_face_finder(), px=120)
    return Image.fromarray(found.faces[0].pixels)


def predicted(predictor: Predictor, path: Path, finder: object, top_k: int = 3) -> list[dict]:
    """The faces of a file as ``rafce predict`` prints them."""
    loaded = load_file(path, finder=finder, px=predictor.bundle.preprocessing.stored_px)
    (found,) = predict_files(predictor, [loaded], batch_size=8, top_k=top_k)
    return found.to_json()["faces"]


def assert_same(found: object, expected: object, where: str = "answer") -> None:
    """Equal in everything, numbers to 1e-6."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-6), where
    else:
        assert found == expected, where


def in_every_mode(image: Image.Image, encode) -> dict[str, bytes]:
    """One face in every kind of file that it may come in."""
    files = {
        "progressive": encode(image, "JPEG", quality=95, progressive=True),
        "cmyk": encode(image.convert("CMYK"), "JPEG", quality=95),
        "opaque alpha": encode(image.convert("RGBA"), "PNG"),
        "webp": encode(image, "WEBP", quality=95),
        "lossless webp": encode(image, "WEBP", lossless=True),
        "palette": encode(image.quantize(256), "PNG"),
    }
    for orientation, turn in TURNED_BACK.items():
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        lying = image if turn is None else image.transpose(turn)
        files[f"exif {orientation}"] = encode(lying, "JPEG", quality=95, exif=exif)
    return files


def in_every_grey_mode(image: Image.Image, encode) -> dict[str, bytes]:
    grey = image.convert("L")
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    return {
        "grey jpeg": encode(grey, "JPEG", quality=95),
        "16 bit": encode(sixteen, "PNG"),
        "grey alpha": encode(grey.convert("LA"), "PNG"),
        "grey palette": encode(grey.convert("P"), "PNG"),
    }


def emotions(face: dict) -> np.ndarray:
    return np.array([one["probability"] for one in face["emotion"]["distribution"]])


def action_units(face: dict) -> np.ndarray:
    return np.array([one["probability"] for one in face["action_units"]])


def test_a_photograph_gets_the_answer_of_rafce_predict(client: httpx.Client, predictor, photograph):
    expected = predicted(predictor, photograph, build_face_finder())
    answer = client.post("/v1/predict", content=photograph.read_bytes(), headers={"content-type": "image/jpeg"}).json()
    (result,) = answer["results"]
    assert (result["status"], result["faces_left_out"], result["error"]) == ("ok", 0, None)
    assert len(expected) == 1
    assert_same(result["faces"], expected)


def test_faces_get_the_answers_of_rafce_predict_alone_and_together(client, predictor, faces, encode, tmp_path):
    contents = [encode(one) for one in faces(9, seed=3)]
    expected = []
    for index, content in enumerate(contents):
        path = tmp_path / f"{index}.png"
        path.write_bytes(content)
        expected.append(predicted(predictor, path, None, top_k=4))
    options = {"faces": "aligned", "top_k": 4}
    together = client.post(
        "/v1/predict",
        json={"images": [{"data": base64.b64encode(content).decode()} for content in contents], "options": options},
    ).json()
    for content, result, one in zip(contents, together["results"], expected, strict=True):
        alone = client.post("/v1/predict", params=options, content=content, headers={"content-type": "image/png"})
        assert_same(alone.json()["results"][0]["faces"], one)
        assert_same(result["faces"], one)


@pytest.mark.parametrize("kinds", [in_every_mode, in_every_grey_mode])
def test_one_face_in_every_kind_of_file_is_one_face(client, face, encode, kinds):
    files = kinds(face, encode)
    reference = encode(face if kinds is in_every_mode else face.convert("L"), "PNG")
    contents = {"reference": reference, **files, "headlong": encode(face.rotate(180))}
    images = [{"id": name, "data": base64.b64encode(content).decode()} for name, content in contents.items()]
    options = {"faces": "aligned", "return_distribution": True}
    results = client.post("/v1/predict", json={"images": images, "options": options}).json()["results"]
    (expected,) = results[0]["faces"]
    *others, headlong = results[1:]
    # The model tells a face from one that lies on its head, so a file that is read the wrong way would show.
    assert np.abs(emotions(headlong["faces"][0]) - emotions(expected)).max() > 0.04
    for result in others:
        assert result["status"] == "ok", result
        (found,) = result["faces"]
        assert found["emotion"]["label"] == expected["emotion"]["label"], result["id"]
        np.testing.assert_allclose(emotions(found), emotions(expected), atol=0.02, err_msg=result["id"])
        np.testing.assert_allclose(action_units(found), action_units(expected), atol=0.02, err_msg=result["id"])


def test_a_lying_photograph_is_found_upright(client, photograph, encode):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    with Image.open(photograph) as image:
        lying = encode(image.transpose(TURNED_BACK[6]), "JPEG", quality=95, exif=exif)
        width, height = image.size
    found = client.post("/v1/predict", content=lying, headers={"content-type": "image/jpeg"}).json()["results"][0]
    upright = client.post(
        "/v1/predict", content=photograph.read_bytes(), headers={"content-type": "image/jpeg"}
    ).json()["results"][0]
    assert (found["width"], found["height"]) == (width, height)
    assert found["faces"][0]["emotion"]["label"] == upright["faces"][0]["emotion"]["label"]
    for side, value in upright["faces"][0]["box"].items():
        assert found["faces"][0]["box"][side] == pytest.approx(value, abs=8)


def test_the_distribution_is_all_classes_by_index_and_sums_to_one(client, predictor, faces, encode):
    answer = client.post(
        "/v1/predict",
        params={"faces": "aligned", "return_distribution": "true", "top_k": 1},
        content=encode(faces(1)[0]),
        headers={"content-type": "image/png"},
    ).json()
    emotion = answer["results"][0]["faces"][0]["emotion"]
    expected = predictor.probabilities(faces(1)).emotion[0]
    assert [one["index"] for one in emotion["distribution"]] == [0, 1, 2, 3]
    assert [one["label"] for one in emotion["distribution"]] == list(predictor.bundle.taxonomy.emotions)
    np.testing.assert_allclose([one["probability"] for one in emotion["distribution"]], expected, atol=1e-6)
    assert sum(one["probability"] for one in emotion["distribution"]) == pytest.approx(1, abs=1e-12)
    assert emotion["top"] == [emotion["distribution"][int(expected.argmax())]]


def test_records_are_written_as_the_standard_library_would(predictor, faces):
    from rafce_ray.bundle.model import plain
    from rafce_ray.faces.face import given_face

    images = faces(1)
    (prediction,) = predictor.predict(images)
    given = given_face(images[0], 40, 40)
    written = to_json(face_answer(given, prediction, None))
    detection = {"detector": "given", "score": None}
    expected = {"box": plain(given.box), "alignment": given.alignment, "detection": detection, **prediction.to_json()}
    assert json.loads(written) == json.loads(standard_json(expected))
    with_distribution = face_answer(
        given, prediction, distribution_of(np.array([0.1, 0.2, 0.3, 0.4]), predictor.bundle.taxonomy)
    )
    assert json.loads(to_json(with_distribution))["emotion"]["distribution"][3] == {
        "label": "calm",
        "index": 3,
        "probability": 0.4,
    }
