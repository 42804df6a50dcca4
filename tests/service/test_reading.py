"""Bytes to faces: the same crops as ``rafce predict``'s, off the event loop, and every fault with its code."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from needs import PHOTOGRAPHS

from rafce_ray.base.errors import UsageError
from rafce_ray.faces.decode import Photograph
from rafce_ray.faces.detect import build_face_finder
from rafce_ray.faces.face import Box, Detection, Face
from rafce_ray.faces.files import load_file
from rafce_ray.service import predicting
from rafce_ray.service.predicting import Reader
from rafce_ray.service.problems import Problem

PX = 40


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    with ThreadPoolExecutor(2) as pool:
        yield Reader(pool, 2, max_faces=2)


class Finder:
    """Finds as many faces as the picture's first pixel has red, largest first, and notes who asked."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def find(self, photograph: Photograph, px: int) -> list[Face]:
        self.threads.append(threading.current_thread().name)
        num, crop = int(photograph.part(1).pixels[0, 0, 0]), np.zeros((px, px, 3), np.uint8)
        return [Face(Box(0, 0, 90 - i, 90 - i), "box", crop, Detection("cascades", None)) for i in range(num)]


@pytest.fixture
def reader_of_counted_faces(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Reader, Finder]]:
    finder = Finder()
    monkeypatch.setattr(predicting, "build_face_finder", lambda model, min_score: finder)
    with ThreadPoolExecutor(1, "images") as pool:
        yield Reader(pool, 1, max_faces=2), finder


def flat(red: int) -> np.ndarray:
    return np.full((60, 100, 3), (red, 0, 0), np.uint8)


def test_an_aligned_face_is_the_whole_picture(reader, encode):
    pixels = np.random.default_rng(0).integers(0, 256, (PX, PX, 3)).astype(np.uint8)
    found = asyncio.run(reader.read(encode(pixels), PX, "aligned"))
    assert (found.width, found.height, found.faces_left_out) == (PX, PX, 0)
    assert found.faces[0].box == Box(0, 0, PX, PX)
    assert found.faces[0].alignment == "given"
    np.testing.assert_array_equal(found.faces[0].pixels, pixels)


@pytest.mark.needs("photographs")
def test_faces_of_photographs_are_those_of_rafce_predict(reader):
    path = PHOTOGRAPHS / "photos" / "ccby_smiling_004.jpg"
    expected = load_file(path, finder=build_face_finder(), px=PX)
    found = asyncio.run(reader.read(path.read_bytes(), PX, "detect"))
    assert (found.width, found.height) == (expected.width, expected.height)
    assert [face.box for face in found.faces] == [face.box for face in expected.faces]
    np.testing.assert_array_equal(found.faces[0].pixels, expected.faces[0].pixels)


@pytest.mark.parametrize(("num", "kept", "left_out"), [(1, 1, 0), (2, 2, 0), (5, 2, 3)])
def test_more_faces_than_are_answered_for_are_counted(reader_of_counted_faces, encode, num, kept, left_out):
    reader, finder = reader_of_counted_faces
    found = asyncio.run(reader.read(encode(flat(num)), PX, "detect"))
    assert [face.box.width for face in found.faces] == [90, 89][:kept]
    assert found.faces_left_out == left_out
    assert finder.threads[0].startswith("images")


def test_no_face_says_what_to_do(reader_of_counted_faces, encode):
    reader, _ = reader_of_counted_faces
    with pytest.raises(Problem, match="no_face") as wide:
        asyncio.run(reader.read(encode(flat(0)), PX, "detect"))
    assert "larger" in wide.value.hint
    with pytest.raises(Problem) as square:
        asyncio.run(reader.read(encode(flat(0)[:, :60]), PX, "detect"))
    assert "faces=aligned" in square.value.hint


@pytest.mark.parametrize("faces", ["detect", "aligned"])
@pytest.mark.parametrize(
    ("content", "code", "status"),
    [
        (b"", "empty", 422),
        (b"hello, world", "unsupported_format", 415),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 50, "bad_header", 422),
    ],
)
def test_what_is_no_picture_has_its_code(reader, faces, content, code, status):
    with pytest.raises(Problem) as caught:
        asyncio.run(reader.read(content, PX, faces))
    assert (caught.value.code, caught.value.status) == (code, status)
    assert caught.value.hint


def test_a_model_that_is_none_is_told_at_the_start(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        Reader(ThreadPoolExecutor(1), 1, max_faces=1, face_model=tmp_path / "none.onnx")
