"""fer as its page documents it: ``FER()`` or, with the argument ``mtcnn``, ``FER(mtcnn=True)``."""

import sys
from importlib.util import find_spec
from pathlib import Path

if "mtcnn" in sys.argv:
    # Before TensorFlow: loaded after it, PyTorch's compiler ends the process.
    import facenet_pytorch
    import torch

    torch.set_num_threads(1)

import cv2
import numpy as np
from fer.fer import FER
from loop import Face, answer

cv2.setNumThreads(1)
FOLDER = Path(find_spec("fer").submodule_search_locations[0])


def main() -> None:
    packages, files = ["fer", "tensorflow-cpu"], [FOLDER / "data" / "emotion_model_quantized.tflite"]
    if "mtcnn" in sys.argv:
        packages += ["facenet-pytorch", "torch"]
        files += sorted((Path(facenet_pytorch.__file__).parent / "data").glob("?net.pt"))
    else:
        packages.append("opencv-contrib-python-headless")
        files.append(Path(cv2.data.haarcascades) / "haarcascade_frontalface_default.xml")
    detector = FER(mtcnn="mtcnn" in sys.argv)

    def read(file: str, given: bool) -> list[Face]:
        picture = cv2.imdecode(np.frombuffer(Path(file).read_bytes(), np.uint8), cv2.IMREAD_COLOR)
        whole = [(0, 0, picture.shape[1], picture.shape[0])] if given else None
        found = detector.detect_emotions(picture, face_rectangles=whole)
        return [(float(face["box"][2] * face["box"][3]), face["emotions"]) for face in found]

    answer(packages, "MIT", files, read)


if __name__ == "__main__":
    main()
