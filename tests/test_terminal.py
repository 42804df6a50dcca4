"""Faces drawn in a terminal: brightness as characters, colours as half blocks, probabilities as bars."""

import io

import numpy as np
from rich.console import Console

from rafce_ray.base.errors import Finding
from rafce_ray.bundle.model import ActionUnitPrediction, EmotionPrediction, EmotionScore, FacePrediction, FilePrediction
from rafce_ray.bundle.terminal import BAR, WIDTH, show
from rafce_ray.faces.face import Box, Detection, Face
from rafce_ray.faces.files import LoadedFile


def drawn(pixels: np.ndarray, **options: object) -> str:
    """What is printed for one face that is three quarters happy, with AU12 and without AU4."""
    happy = EmotionScore("happy", 0, 0.75)
    emotion = EmotionPrediction(**vars(happy), unsure=True, top=(happy, EmotionScore("sad", 1, 0.25)), basic=())
    units = (
        ActionUnitPrediction("AU12", "Lip corner puller", 1.0, 0.5, True),
        ActionUnitPrediction("AU4", "Brow lowerer", 0.1, 0.5, False),
    )
    place = {"box": Box(0, 0, 64, 64), "alignment": "given", "detection": Detection("given", None)}
    face = FacePrediction(**place, emotion=emotion, action_units=units, consistency=None)
    stream = io.StringIO()
    console = Console(file=stream, width=90, **options)
    result = FilePrediction("a\x1b.png", 64, 64, (face,), None)
    show(result, LoadedFile("a.png", 64, 64, (Face(**place, pixels=pixels),), None), console)
    return stream.getvalue()


def test_without_colours_brightness_becomes_characters():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 32:] = 255
    title, *lines = drawn(pixels).splitlines()
    assert "\x1b" not in title
    assert len(lines) == WIDTH // 2
    assert all(line[:WIDTH] == " " * (WIDTH // 2) + "@" * (WIDTH // 2) for line in lines)


def test_bars_are_as_long_as_probabilities_and_inactive_units_are_left_out():
    text = drawn(np.zeros((64, 64, 3), np.uint8))
    happy = next(line for line in text.splitlines() if "happy" in line)
    assert (happy.count("█"), "75%" in happy) == (round(BAR * 0.75), True)
    assert next(line for line in text.splitlines() if "AU12" in line).count("█") == BAR
    assert "AU4" not in text
    assert "unsure" in text


def test_colours_are_those_of_the_two_pixels_of_a_block():
    pixels = np.zeros((WIDTH, WIDTH, 3), np.uint8)
    pixels[::2] = (200, 10, 20)
    assert "\x1b[38;2;200;10;20;48;2;0;0;0m▀" in drawn(pixels, force_terminal=True, color_system="truecolor")


def test_a_file_without_a_face_says_why():
    stream = io.StringIO()
    problem = Finding("error", "no_face", "no face was found.", "Send a larger picture.")
    result = FilePrediction("b.png", 10, 10, (), problem)
    show(result, LoadedFile("b.png", 10, 10, (), problem), Console(file=stream, width=90))
    assert stream.getvalue().strip() == "b.png: no face was found. Send a larger picture."
