"""facex (PyPI) as its page documents it: a BGR picture to ``predict``."""

from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
from facex import EmotionClassifier
from loop import Face, answer

cv2.setNumThreads(1)
ASSETS = Path(find_spec("facex").submodule_search_locations[0]) / "assets"


def main() -> None:
    files = [ASSETS / "model_optimized.tflite", ASSETS / "haarcascade_frontalface_default.xml"]
    classifier = EmotionClassifier(str(files[0]))

    def read(file: str, given: bool) -> list[Face]:
        picture = cv2.imdecode(np.frombuffer(Path(file).read_bytes(), np.uint8), cv2.IMREAD_COLOR)
        if given:
            found = [(1.0, classifier.detect_emotion(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)))]
        else:
            found = [(float(one["bbox"][2] * one["bbox"][3]), one["emot"]) for one in classifier.predict(picture)]
        return [(area, {name: float(value) for name, value in scores.items()}) for area, scores in found]

    answer(["facex", "tensorflow-cpu", "opencv-contrib-python-headless"], "MIT", files, read)


if __name__ == "__main__":
    main()
