"""``rafce predict``: emotions and action units of every face in image files; and the ``Predictor`` that everything shares."""

from __future__ import annotations

import argparse
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rafce_ray.bundle import Bundle, load_bundle
from rafce_ray.calibration import Outputs, Probabilities, calibrated
from rafce_ray.consistency import basic_emotion_membership, consistency_of
from rafce_ray.console import progress_bar, run_main, say
from rafce_ray.decode import DEFAULT_LIMITS, DecodeError, decode_image, decode_sized_face
from rafce_ray.faces import Face, FaceFinder, build_face_finder, given_face, may_be_aligned
from rafce_ray.hardware import choose_device
from rafce_ray.image_files import find_images
from rafce_ray.inference.engines import Engine, TorchEngine
from rafce_ray.prediction import (
    ActionUnitPrediction,
    BasicEmotionScore,
    ConsistencyRemark,
    EmotionPrediction,
    EmotionScore,
    FacePrediction,
    FilePrediction,
    FileProblem,
    Prediction,
)
from rafce_ray.prediction_output import check_out, open_output
from rafce_ray.taxonomy import ACTION_UNIT_NAMES, action_unit_code

NO_FACE = "no_face"
UNREADABLE = "unreadable"


class Predictor:
    """A bundle ready to predict: evaluation mode, no gradients; a face's result does not depend on its batch-mates.

    ``engine`` runs the network; by default torch does, in fp32 on ``device``, to which the bundle's model is then moved.
    """

    def __init__(self, bundle: Bundle, device: torch.device | str = "cpu", engine: Engine | None = None) -> None:
        self.bundle = bundle
        self.engine = TorchEngine(bundle, torch.device(device)) if engine is None else engine
        self._basic_emotions = bundle.taxonomy.basic_emotions
        self._membership = basic_emotion_membership(bundle.taxonomy)

    @property
    def device(self) -> torch.device:
        """Where the engine computes."""
        return self.engine.device

    def outputs(self, images: NDArray[np.uint8] | Tensor) -> Outputs:
        """Raw outputs of (B, S, S, 3) uint8 RGB faces of the bundle's ``preprocessing.stored_px`` a side.

        Raises:
            ValueError: another dtype or shape.
        """
        return self.engine.outputs(images)

    def probabilities(self, images: NDArray[np.uint8] | Tensor) -> Probabilities:
        """Calibrated probabilities; images as for :meth:`outputs`."""
        return calibrated(self.outputs(images), self.bundle.calibration)

    def predict(self, images: NDArray[np.uint8] | Tensor, top_k: int = 3) -> list[Prediction]:
        """One :class:`Prediction` a face, with names; images as for :meth:`outputs`."""
        return self.named(self.probabilities(images), top_k)

    def named(self, found: Probabilities, top_k: int = 3) -> list[Prediction]:
        """One :class:`Prediction` a face from its calibrated probabilities."""
        basics = found.emotion @ self._membership
        rows = zip(found.emotion.tolist(), basics.tolist(), found.action_units.tolist(), strict=True)
        return [self._prediction(*row, top_k) for row in rows]

    def _prediction(
        self, emotion: list[float], basics: list[float], action_units: list[float], top_k: int
    ) -> Prediction:
        taxonomy, calibration = self.bundle.taxonomy, self.bundle.calibration
        units = zip(taxonomy.action_units, action_units, calibration.au_thresholds, strict=True)
        found = tuple(
            ActionUnitPrediction(
                action_unit_code(number), ACTION_UNIT_NAMES.get(number, ""), value, threshold, value >= threshold
            )
            for number, value, threshold in units
        )
        if not emotion:
            return Prediction(None, found, None)
        # Plain lists: a face has a few dozen numbers, and each call into NumPy costs a busy server more than all of them.
        order = sorted(range(len(emotion)), key=lambda index: -emotion[index])[: max(1, top_k)]
        top = tuple(EmotionScore(taxonomy.emotions[index], index, emotion[index]) for index in order)
        unsure = calibration.unsure_below is not None and top[0].probability < calibration.unsure_below
        scores = tuple(BasicEmotionScore(*pair) for pair in zip(self._basic_emotions, basics, strict=True))
        read = EmotionPrediction(top[0].label, top[0].index, top[0].probability, unsure, top, scores)
        return Prediction(read, found, self._consistency(top[0].index, found))

    def _consistency(self, label: int, units: tuple[ActionUnitPrediction, ...]) -> ConsistencyRemark | None:
        association = self.bundle.association
        if association is None or not units:
            return None
        found = consistency_of(association, label, [unit.active for unit in units])
        if found is None:
            return None
        return ConsistencyRemark(found.score, tuple(units[column].code for column in found.contradicting))


@dataclass(frozen=True)
class LoadedFile:
    """What was found in one file, before prediction; ``problem`` where there is no face to predict."""

    path: str
    width: int | None
    height: int | None
    faces: tuple[Face, ...]
    problem: FileProblem | None


def load_file(path: Path, *, finder: FaceFinder | None, px: int) -> LoadedFile:
    """Read and decode one file and cut out its faces at ``px`` a side; without a finder the image is one aligned face.

    Never raises for what a file holds: a broken file gives a ``problem``.
    """
    width = height = None
    try:
        with path.open("rb") as stream:
            content = stream.read(DEFAULT_LIMITS.max_bytes + 1)
        if finder is None:
            face = decode_sized_face(content, px)
            return LoadedFile(
                str(path), face.width, face.height, (given_face(face.pixels, face.width, face.height),), None
            )
        photograph = decode_image(content)
    except OSError as error:
        problem = FileProblem(
            UNREADABLE,
            f"the file cannot be read ({error.strerror or error}).",
            "Check that it is there and may be read.",
        )
    except DecodeError as error:
        problem = FileProblem(error.code, error.message, error.remedy)
    else:
        height, width = photograph.shape[:2]
        faces = finder.find(photograph, px)
        if faces:
            return LoadedFile(str(path), width, height, tuple(faces), None)
        problem = FileProblem(NO_FACE, "no face was found.", _no_face_remedy(width, height))
    return LoadedFile(str(path), width, height, (), problem)


def predict_files(
    predictor: Predictor, files: Iterable[LoadedFile], *, batch_size: int, top_k: int
) -> Iterator[FilePrediction]:
    """One result a file, in order; faces of several files share batches, and no more than a batch of files is held."""
    waiting: list[LoadedFile] = []
    num_faces = 0
    for file in files:
        waiting.append(file)
        num_faces += len(file.faces)
        if num_faces >= batch_size or len(waiting) >= 4 * batch_size:
            yield from _predict_waiting(predictor, waiting, batch_size, top_k)
            waiting, num_faces = [], 0
    yield from _predict_waiting(predictor, waiting, batch_size, top_k)


def _predict_waiting(
    predictor: Predictor, files: list[LoadedFile], batch_size: int, top_k: int
) -> Iterator[FilePrediction]:
    crops = [face.pixels for file in files for face in file.faces]
    predictions: list[Prediction] = []
    for start in range(0, len(crops), batch_size):
        predictions += predictor.predict(np.stack(crops[start : start + batch_size]), top_k)
    following = iter(predictions)
    for file in files:
        faces = tuple(FacePrediction(face.box, face.alignment, next(following)) for face in file.faces)
        yield FilePrediction(file.path, file.width, file.height, faces, file.problem)


def main(argv: list[str] | None = None) -> int:
    """``rafce predict``; exit code 1 if nothing at all could be predicted."""
    return run_main(_main, argv)


def _main(argv: list[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    out = check_out(arguments.out)
    num_files = sum(1 for _ in find_images(arguments.paths))
    finder = None if arguments.faces == "aligned" else build_face_finder(arguments.face_model)
    bundle = load_bundle(arguments.bundle)
    predictor = Predictor(bundle, choose_device(arguments.device))
    # A core is left to reading: OpenMP's threads wait in a busy loop, which cost a factor of 10 where they had to share.
    torch.set_num_threads(min(torch.get_num_threads(), max(1, _num_cores() - 1)))
    say(_plan(arguments, bundle, predictor.device, num_files))
    load = partial(load_file, finder=finder, px=bundle.preprocessing.stored_px)
    counts: Counter[str] = Counter()
    with (
        progress_bar("predicting", num_files) as advance,
        open_output(out, bundle, arguments.top_k) as write,
        ThreadPoolExecutor(_num_readers(), thread_name_prefix="images") as pool,
    ):
        loaded = _ahead(pool, load, find_images(arguments.paths))
        for result in predict_files(predictor, loaded, batch_size=arguments.batch_size, top_k=arguments.top_k):
            write(result)
            counts.update(_outcomes(result))
            advance(1)
    say(_summary(arguments, counts))
    return 0 if counts["predicted"] else 1


def _ahead(pool: ThreadPoolExecutor, load: Callable[[Path], LoadedFile], paths: Iterable[Path]) -> Iterator[LoadedFile]:
    """``load`` of every path in order, a few files ahead of whoever takes them."""
    window: deque[Future[LoadedFile]] = deque()
    for path in paths:
        window.append(pool.submit(load, path))
        if len(window) > 2 * _num_readers():
            yield window.popleft().result()
    while window:
        yield window.popleft().result()


def _num_readers() -> int:
    return min(8, _num_cores())


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _outcomes(result: FilePrediction) -> dict[str, int]:
    if result.problem is None:
        return {"files": 1, "predicted": 1, "faces": len(result.faces)}
    return {"files": 1, NO_FACE if result.problem.code == NO_FACE else "broken": 1}


def _plan(arguments: argparse.Namespace, bundle: Bundle, device: torch.device, num_files: int) -> str:
    detector = (
        f"found with {arguments.face_model or 'the bundled cascades'}"
        if arguments.faces == "detect"
        else "taken as aligned"
    )
    return (
        f"Predicting {num_files:,} image files on {device}: faces {detector}; {bundle.architecture.backbone} of {bundle.path} "
        f"({bundle.taxonomy.num_emotions} emotions, {bundle.taxonomy.num_action_units} action units); "
        f"results to {arguments.out or 'standard output as JSON lines'}."
    )


def _summary(arguments: argparse.Namespace, counts: Counter[str]) -> str:
    left_out = [
        f"{counts[key]:,} {what}"
        for key, what in ((NO_FACE, "without a face"), ("broken", "that could not be read (see error in their rows)"))
        if counts[key]
    ]
    done = f"{counts['faces']:,} faces predicted in {counts['predicted']:,} of {counts['files']:,} files"
    hint = f"rafce evaluate --bundle {arguments.bundle} measures this bundle on labelled faces."
    if not counts["predicted"]:
        hint = "see what is wrong, and the remedy, under error in each row."
    elif arguments.out is None:
        hint = "--out FILE.csv, .parquet or .jsonl keeps them in a file."
    return f"{done}{''.join(', ' + text for text in left_out)}; written to {arguments.out or 'standard output'}. Next: {hint}"


def _no_face_remedy(width: int, height: int) -> str:
    if may_be_aligned(width, height):
        return "If this is an aligned face already, use --faces aligned."
    return "Use a picture in which the face is larger and seen from the front, or give --face-model a YuNet file."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce predict",
        description="Find the faces in image files and read their emotions and action units: one JSON line a file to "
        "standard output, or a row a face in a CSV or Parquet file.",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="image files, folders (searched with all below them) or globs"
    )
    parser.add_argument("--bundle", required=True, help="bundle folder, or the folder of a finished run; a path or URI")
    parser.add_argument("--out", type=Path, metavar="FILE", help="new file to write: .jsonl, .csv or .parquet")
    parser.add_argument(
        "--faces",
        choices=("detect", "aligned"),
        default="detect",
        help="detect: find and align the faces of photographs; aligned: every image is one aligned face, as in RAF-CE",
    )
    parser.add_argument(
        "--face-model", type=Path, metavar="FILE.onnx", help="YuNet model for detection instead of the bundled cascades"
    )
    parser.add_argument("--top-k", type=_positive, default=3, help="emotions listed per face (default 3)")
    parser.add_argument("--batch-size", type=_positive, default=64, help="faces per forward pass (default 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
