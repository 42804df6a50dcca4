"""``rafce predict``: emotions and action units of every face in image files; and the ``Predictor`` that everything shares.

With ``--ray`` the files are predicted on a Ray cluster (``predict_on_ray``); nothing else here needs ray.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rafce_ray.bundle import Bundle, load_bundle
from rafce_ray.calibration import Outputs, Probabilities, calibrated
from rafce_ray.consistency import basic_emotion_membership, consistency_of
from rafce_ray.console import progress_bar, run_main, say
from rafce_ray.errors import UsageError
from rafce_ray.faces import build_face_finder
from rafce_ray.hardware import choose_device
from rafce_ray.image_files import Skipped, find_images
from rafce_ray.image_loading import NO_FACE, LoadedFile, load_ahead, load_file
from rafce_ray.inference.engines import Engine, TorchEngine
from rafce_ray.prediction import (
    ActionUnitPrediction,
    BasicEmotionScore,
    ConsistencyRemark,
    EmotionPrediction,
    EmotionScore,
    FacePrediction,
    FilePrediction,
    Prediction,
)
from rafce_ray.prediction_output import FORMATS, check_out, open_output
from rafce_ray.taxonomy import ACTION_UNIT_NAMES, action_unit_code

__all__ = ["LoadedFile", "Predictor", "detector_of", "in_words", "load_file", "main", "outcomes", "predict_files"]


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
    arguments = _arguments(argv)
    if arguments.ray:
        return _main_on_ray(arguments)
    _refuse_cluster_options(arguments)
    uris = [path for path in arguments.paths if "://" in path and not path.startswith("file://")]
    if uris:
        raise UsageError(f"{uris[0]}: object stores are read on a cluster alone. Add --ray --out FOLDER.")
    out = check_out(None if arguments.out is None else Path(arguments.out))
    device, skipped = choose_device(arguments.device), Skipped()
    num_files = sum(1 for _ in find_images(arguments.paths, skipped))
    finder = None if arguments.faces == "aligned" else build_face_finder(arguments.face_model)
    bundle = load_bundle(arguments.bundle)
    predictor = Predictor(bundle, device)
    # A core is left to reading: OpenMP's threads wait in a busy loop, which cost a factor of 10 where they had to share.
    torch.set_num_threads(min(torch.get_num_threads(), max(1, _num_cores() - 1)))
    say(_plan(arguments, bundle, predictor.device, num_files))
    load = partial(load_file, finder=finder, px=bundle.preprocessing.stored_px)
    counts: Counter[str] = Counter()
    with (
        progress_bar("predicting", num_files) as advance,
        open_output(out, bundle, arguments.top_k) as write,
    ):
        loaded = load_ahead(load, find_images(arguments.paths), min(8, _num_cores()))
        for result in predict_files(predictor, loaded, batch_size=arguments.batch_size, top_k=arguments.top_k):
            write(result)
            counts.update(outcomes(result))
            advance(1)
    if skipped.counts:
        say(skipped.in_words())
    say(_summary(arguments, counts))
    return 0 if counts["predicted"] else 1


def _arguments(argv: list[str]) -> argparse.Namespace:
    """The command line. All after ``--`` are paths: argparse does not know that where options may follow paths."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv[:end])
    arguments.paths += argv[end + 1 :]
    if not arguments.paths:
        parser.error("give at least one PATH; for a name that begins with a dash: -- -name.jpg, or ./-name.jpg")
    return arguments


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def outcomes(result: FilePrediction) -> Counter[str]:
    """What one file adds to the counts ``files``, ``predicted`` (files), ``faces``, ``no_face`` and ``broken`` (files)."""
    if result.problem is None:
        return Counter(files=1, predicted=1, faces=len(result.faces))
    return Counter({"files": 1, NO_FACE if result.problem.code == NO_FACE else "broken": 1})


def in_words(counts: Counter[str], where: str = "error in their rows") -> str:
    """The sums of :func:`outcomes` as a sentence's beginning; ``where``: what tells why a file could not be read."""
    left_out = [
        f"{counts[key]:,} {what}"
        for key, what in ((NO_FACE, "without a face"), ("broken", f"that could not be read (see {where})"))
        if counts[key]
    ]
    done = f"{counts['faces']:,} faces predicted in {counts['predicted']:,} of {counts['files']:,} files"
    return done + "".join(", " + text for text in left_out)


def detector_of(faces: str, face_model: Path | None) -> str:
    """How faces are come by, in words."""
    return f"found with {face_model or 'the bundled cascades'}" if faces == "detect" else "taken as aligned"


def _plan(arguments: argparse.Namespace, bundle: Bundle, device: torch.device, num_files: int) -> str:
    detector = detector_of(arguments.faces, arguments.face_model)
    return (
        f"Predicting {num_files:,} image files on {device}: faces {detector}; {bundle.architecture.backbone} of {bundle.path} "
        f"({bundle.taxonomy.num_emotions} emotions, {bundle.taxonomy.num_action_units} action units); "
        f"results to {arguments.out or 'standard output as JSON lines'}."
    )


def _summary(arguments: argparse.Namespace, counts: Counter[str]) -> str:
    hint = f"rafce evaluate --bundle {arguments.bundle} measures this bundle on labelled faces."
    if not counts["predicted"]:
        hint = "see what is wrong, and the remedy, under error in each row."
    elif arguments.out is None:
        hint = "--out FILE.csv, .parquet or .jsonl keeps them in a file."
    return f"{in_words(counts)}; written to {arguments.out or 'standard output'}. Next: {hint}"


def _main_on_ray(arguments: argparse.Namespace) -> int:
    if arguments.out is None or Path(arguments.out).suffix.lower() in FORMATS:
        found = "none was given" if arguments.out is None else f"found {arguments.out}"
        raise UsageError(f"--ray: --out must name a folder or a URI for the Parquet files; {found}. Add --out FOLDER.")
    if arguments.device not in ("auto", "cpu"):
        raise UsageError(f"--device {arguments.device}: with --ray each worker gets its own GPU. Use auto or cpu.")
    if find_spec("ray") is None:
        raise UsageError("--ray: ray is not installed. Install it with pip install 'rafce_ray[ray]'.")
    from rafce_ray.predict_on_ray import predict_on_ray

    return predict_on_ray(
        arguments.paths,
        bundle=arguments.bundle,
        out=arguments.out,
        faces=arguments.faces,
        face_model=arguments.face_model,
        top_k=arguments.top_k,
        batch_size=arguments.batch_size,
        shard_files=arguments.shard_files,
        workers=arguments.workers,
        use_gpu=None if arguments.device == "auto" else False,
    )


def _refuse_cluster_options(arguments: argparse.Namespace) -> None:
    for name in ("workers", "shard_files"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: is for predicting on a cluster. Add --ray, or leave it out.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce predict",
        description="Find the faces in image files and read their emotions and action units: one JSON line a file to "
        "standard output, or a row a face in a CSV or Parquet file. With --ray on a Ray cluster, into a folder of Parquet files.",
    )
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="image files, folders (searched with all below them) or globs"
    )
    parser.add_argument("--bundle", required=True, help="bundle folder, or the folder of a finished run; a path or URI")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="new file to write: .jsonl, .csv or .parquet; with --ray a folder or URI, where the same command goes on",
    )
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
    cluster = parser.add_argument_group(
        "on a cluster",
        "the one of RAY_ADDRESS, or a local one; paths may be URIs (s3://...), and local ones are read by every machine",
    )
    cluster.add_argument(
        "--ray", action="store_true", help="predict on Ray, in shards that a killed run need not repeat"
    )
    cluster.add_argument(
        "--workers", type=_positive, metavar="N", help="processes (default: one a GPU, else one a CPU)"
    )
    cluster.add_argument("--shard-files", type=_positive, metavar="N", help="images a Parquet file (default 2000)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
