"""rafce_ray as ``rafce predict --bundle BUNDLE`` reads a file."""

import sys
from pathlib import Path

import cv2
import torch
from loop import Face, answer

from rafce_ray.bundle.bundle import Bundle, load_bundle
from rafce_ray.bundle.model import Predictor, predict_files
from rafce_ray.faces.detect import build_face_finder
from rafce_ray.faces.files import load_file

torch.set_num_threads(1)
cv2.setNumThreads(1)
HAPPY = ("smiling", "happy", "happiness")


def in_words(bundle: Bundle) -> str:
    config = bundle.provenance.get("config", {})
    weights, epochs = config.get("model", {}).get("weights"), config.get("optim", {}).get("epochs")
    architecture = bundle.architecture
    return f"{architecture.backbone} at {architecture.image_px} px, starting weights {weights}, {epochs} epochs"


def main() -> None:
    bundle = load_bundle(sys.argv[1])
    predictor, finder = Predictor(bundle), build_face_finder()
    px, emotions = bundle.preprocessing.stored_px, [name.lower() for name in bundle.taxonomy.emotions]
    if "neutral" not in emotions or not set(HAPPY) & set(emotions):
        sys.exit(
            f"{sys.argv[1]}: found the emotions {emotions}, expected neutral and one of {HAPPY}. Give another bundle."
        )

    def read(file: str, given: bool) -> list[Face]:
        loaded = load_file(Path(file), finder=None if given else finder, px=px)
        (result,) = predict_files(predictor, [loaded], batch_size=64, top_k=bundle.taxonomy.num_emotions)
        faces = []
        for face in result.faces:
            scores = {score.label.lower(): score.probability for score in face.emotion.top}
            scores = {"happy" if name in HAPPY else name: value for name, value in scores.items()}
            faces.append((float(face.box.width * face.box.height), scores))
        return faces

    answer(
        ["rafce_ray", "torch", "opencv-python-headless"],
        "Apache-2.0",
        [Path(bundle.path) / "model.safetensors"],
        read,
        model=in_words(bundle),
    )


if __name__ == "__main__":
    main()
