"""A bundle: a folder with all that is needed to predict, and without any pickle.

``model.safetensors`` holds the weights, ``canary.safetensors`` a few images with torch's answers to them.
``bundle.json`` holds the sha256 of both, the architecture, the taxonomy with names, the preprocessing, the calibration,
the association of emotions and action units, the reference for drift, metrics and provenance.
``MODEL_CARD.md`` describes the model for people.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.numpy
import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from rafce_ray.base.console import finite
from rafce_ray.base.errors import RafceError
from rafce_ray.base.storage import Location, StorageError, locate, new_folder
from rafce_ray.base.taxonomy import ACTION_UNIT_NAMES, Taxonomy, action_unit_code, parse_action_unit_token
from rafce_ray.bundle.canary import Canary, canary_from_tensors, canary_to_bytes, draw_canary
from rafce_ray.faces.preprocess import Preprocessing
from rafce_ray.metrics.calibration import Calibration
from rafce_ray.metrics.consistency import Association
from rafce_ray.metrics.drift import DriftReference
from rafce_ray.model.network import Architecture, MultiTaskModel, build_model

FORMAT_VERSION = 4
"""Version of the layout that this code writes; it also reads all earlier ones."""

_SINCE = {"association": 2, "canary": 3, "drift_reference": 4}
"""Keys of the manifest that earlier versions lack, with the version that introduced them."""

MANIFEST = "bundle.json"
WEIGHTS = "model.safetensors"
CANARY = "canary.safetensors"
MODEL_CARD = "MODEL_CARD.md"

Record = TypeVar("Record")

_PICKLE_SUFFIXES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz"})
_PICKLE_STARTS = (*(b"\x80" + bytes([protocol]) for protocol in range(2, 6)), b"PK\x03\x04")


class BundleError(RafceError):
    """A folder is not a usable bundle; the message names the file, what was found and what was expected."""


def refuse_pickles(folder: Path) -> None:
    """BundleError where a file below the folder looks like a pickle."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        with path.open("rb") as stream:
            start = stream.read(4)
        if path.suffix.lower() in _PICKLE_SUFFIXES or start.startswith(_PICKLE_STARTS):
            raise BundleError(
                f"{path}: looks like a pickle, which can run any code when it is read. A bundle holds JSON, "
                "safetensors and Markdown only: get it from its source again, or remove the file if you know what it "
                "is."
            )


def read_manifest(folder: Path) -> dict[str, Any]:
    """``bundle.json`` with the keys of the newest version; BundleError where it cannot be read or has other keys."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror or error}). Give a bundle folder.") from None
    except ValueError as error:
        raise BundleError(
            f"{path}: is not JSON ({error}): the file is cut short or altered. Get the bundle again."
        ) from None
    if not isinstance(manifest, dict):
        raise BundleError(f"{path}: holds a {type(manifest).__name__}, expected an object. Get the bundle again.")
    version: Any = manifest.get("format_version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise BundleError(
            f"{path}: format_version is {version!r}; this program reads 1 to {FORMAT_VERSION}. "
            "Use the version of rafce_ray that wrote it, or train again."
        )
    for key in (key for key, since in _SINCE.items() if version < since):
        manifest.setdefault(key, None)
    expected = {"format_version", "weights", "canary", *_READERS}
    if manifest.keys() != expected:
        missing, unknown = sorted(expected - manifest.keys()), sorted(manifest.keys() - expected)
        raise BundleError(
            f"{path}: missing keys {missing}, unknown keys {unknown}. Get the bundle again from its source."
        )
    return manifest


def section(folder: Path, manifest: Mapping[str, Any], key: str, read: Callable[[Any], Record]) -> Record:
    """One section of the manifest as its record; BundleError, with the file and the key, where it cannot be read."""
    try:
        return read(manifest[key])
    except (ValidationError, TypeError, ValueError, KeyError, IndexError) as error:
        reason = repr(error)
        if isinstance(error, ValidationError):
            reason = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise BundleError(
            f"{folder / MANIFEST}: {key} cannot be read: {reason}. Get the bundle again from its source."
        ) from None


def _describe_file(name: str, content: bytes) -> dict[str, Any]:
    return {"file": name, "num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _read_tensors(
    folder: Path, manifest: Mapping[str, Any], key: str, name: str, load: Callable[[bytes], Record]
) -> Record:
    """The tensors of the file that the manifest's ``key`` describes, after its name, size and sha256 were checked."""
    path = folder / name
    file, num_bytes, sha256 = section(
        folder, manifest, key, lambda entry: (entry["file"], int(entry["num_bytes"]), str(entry["sha256"]))
    )
    if file != name:
        raise BundleError(f"{folder / MANIFEST}: {key}.file is {file!r}, expected {name!r}. Get the bundle again.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror or error}). Get the bundle again.") from None
    if len(content) != num_bytes:
        raise BundleError(
            f"{path}: has {len(content):,} bytes instead of {num_bytes:,}: cut short or altered. Get the bundle again."
        )
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise BundleError(f"{path}: was altered: sha256 {found[:12]}… instead of {sha256[:12]}…. Get the bundle again.")
    try:
        return load(content)
    except Exception as error:
        raise BundleError(f"{path}: is no safetensors file ({error}). Get the bundle again.") from None


def taxonomy_to_plain(taxonomy: Taxonomy) -> dict[str, Any]:
    """A taxonomy as plain JSON values: codes and names."""
    return {
        "emotions": [
            {"index": index, "label": label, "components": components}
            for index, (label, components) in enumerate(zip(taxonomy.emotions, taxonomy.components, strict=True))
        ],
        "action_units": [
            {"code": action_unit_code(number), "name": ACTION_UNIT_NAMES.get(number)}
            for number in taxonomy.action_units
        ],
    }


def taxonomy_from_plain(plain: Any) -> Taxonomy:
    """The taxonomy that :func:`taxonomy_to_plain` wrote; ValueError, TypeError or KeyError where it cannot be read."""
    emotions = sorted(plain["emotions"], key=lambda entry: int(entry["index"]))
    if [entry["index"] for entry in emotions] != list(range(len(emotions))):
        raise ValueError("the indices of the emotions are not 0, 1, 2, ...")
    numbers = [parse_action_unit_token(entry["code"]) for entry in plain["action_units"]]
    if None in numbers:
        raise ValueError(f"{[entry['code'] for entry in plain['action_units']]} are not all action units")
    return Taxonomy(
        emotions=tuple(str(entry["label"]) for entry in emotions),
        components=tuple(
            None if entry["components"] is None else (str(entry["components"][0]), str(entry["components"][1]))
            for entry in emotions
        ),
        action_units=tuple(number for number in numbers if number is not None),
    )


_READERS: dict[str, Callable[[Any], Any]] = {
    "taxonomy": taxonomy_from_plain,
    "architecture": Architecture.from_plain,
    "preprocessing": TypeAdapter(Preprocessing).validate_python,
    "calibration": TypeAdapter(Calibration).validate_python,
    "association": TypeAdapter(Association | None).validate_python,
    "drift_reference": TypeAdapter(DriftReference | None).validate_python,
    "metrics": dict,
    "provenance": dict,
}
"""Reader of each section of the manifest, which are also fields of :class:`Bundle`."""


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle; ``model`` is in evaluation mode on the CPU, ``path`` is where the bundle was read from.

    ``canary`` is None where the bundle was written without one: see :func:`canary_of`. ``drift_reference`` is None in
    bundles of earlier versions and in those without measurements, such as a checkpoint's.
    """

    model: MultiTaskModel
    architecture: Architecture
    taxonomy: Taxonomy
    preprocessing: Preprocessing
    calibration: Calibration
    association: Association | None
    metrics: dict[str, Any]
    provenance: dict[str, Any]
    weights_sha256: str
    path: str
    canary: Canary | None = None
    drift_reference: DriftReference | None = None


def save_bundle(
    folder: Path,
    *,
    model: nn.Module,
    architecture: Architecture,
    taxonomy: Taxonomy,
    preprocessing: Preprocessing,
    calibration: Calibration,
    metrics: Mapping[str, Any],
    provenance: Mapping[str, Any],
    association: Association | None = None,
    drift_reference: DriftReference | None = None,
    model_card: str | None = None,
    with_canary: bool = True,
) -> str:
    """Write a bundle into a new folder, which appears whole or not at all; returns the sha256 of the weights file.

    ``metrics`` and ``provenance`` hold plain JSON values; NaN becomes null. ``model_card`` is Markdown. ``with_canary``
    runs a copy of the model on the CPU once, in evaluation mode. It draws no random numbers, and the model stays as it
    was.

    Raises:
        BundleError: the folder exists, or taxonomy, architecture, preprocessing and calibration do not fit together.
    """
    if folder.exists():
        raise BundleError(
            f"{folder}: exists already, and a bundle is never overwritten. Choose another place or remove it."
        )
    parts: dict[str, Any] = {
        "taxonomy": taxonomy,
        "architecture": architecture,
        "preprocessing": preprocessing,
        "calibration": calibration,
        "association": association,
        "drift_reference": drift_reference,
        "metrics": dict(metrics),
        "provenance": dict(provenance),
    }
    _check_fit(str(folder), parts)
    # safetensors wants plain memory layout; the values are unchanged.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    contents = {WEIGHTS: safetensors.torch.save(tensors)}
    if with_canary:
        contents[CANARY] = canary_to_bytes(draw_canary(model, preprocessing))
    weights = _describe_file(WEIGHTS, contents[WEIGHTS])
    manifest = {
        "format_version": FORMAT_VERSION,
        "weights": weights,
        "canary": _describe_file(CANARY, contents[CANARY]) if with_canary else None,
        **{key: part if isinstance(part, dict | None) else asdict(part) for key, part in parts.items()},
        "taxonomy": taxonomy_to_plain(taxonomy),
    }
    contents[MANIFEST] = (json.dumps(finite(manifest), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    if model_card is not None:
        contents[MODEL_CARD] = model_card.encode()
    with new_folder(folder) as scratch:
        for name, content in contents.items():
            with (scratch / name).open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
    return str(weights["sha256"])


def load_bundle(place: str | Path | Location) -> Bundle:
    """Read a bundle from a local folder or a URI; ``place`` may also be a run folder, whose ``bundle/`` is then read.

    Raises:
        BundleError: there is none, or it may not be used: unknown version, missing or unknown keys, weights cut short,
            altered, of other names, shapes or types than the architecture's, or not finite, a canary likewise, or a
            pickle in the folder.
    """
    location = find_bundle(place)
    with location.local_copy() as folder:
        try:
            return _load(folder, str(location))
        except BundleError as error:
            raise BundleError(str(error).replace(str(folder), location.shown)) from None


def find_bundle(place: str | Path | Location) -> Location:
    """The bundle folder at ``place`` or, in a run folder, at its ``bundle/``; BundleError where there is none."""
    location = locate(place)
    try:
        for candidate in (location, location / "bundle"):
            if (candidate / MANIFEST).exists():
                return candidate
    except StorageError:
        raise
    except OSError as error:
        raise BundleError(f"{location}: cannot be read ({error.strerror or error}).") from error
    if (location / "checkpoints").exists():
        raise BundleError(
            f"{location}: this run has no bundle yet: it did not finish. Give the same train command again to go on."
        )
    location.check_reachable()
    what = "nothing is there"
    if location.exists():
        what = "is no bundle: there is no bundle.json in it, nor in a bundle/ below it"
    raise BundleError(f"{location}: {what}. Give the bundle folder that training printed, or its run folder.")


def canary_of(bundle: Bundle) -> Canary:
    """The bundle's canary or, where it was written without one, the one that torch gives now."""
    return bundle.canary or draw_canary(bundle.model, bundle.preprocessing)


def read_taxonomy(location: Location) -> Taxonomy:
    """The taxonomy of a bundle folder, from its manifest alone; BundleError where that cannot be read."""
    folder = location.local
    if folder is None:
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / MANIFEST).write_bytes((location / MANIFEST).read_bytes())
            return read_taxonomy(locate(scratch))
    return section(folder, read_manifest(folder), "taxonomy", taxonomy_from_plain)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a local bundle by name, in the architecture's shapes and dtypes, on the CPU.

    Raises:
        BundleError: the manifest or the weights cannot be read, or the sha256 differs from the manifest's.
    """
    return _read_tensors(folder, read_manifest(folder), "weights", WEIGHTS, safetensors.torch.load)


def _load(folder: Path, name: str) -> Bundle:
    refuse_pickles(folder)
    manifest = read_manifest(folder)
    parts = {key: section(folder, manifest, key, read) for key, read in _READERS.items()}
    _check_fit(str(folder / MANIFEST), parts)
    weights = _read_tensors(folder, manifest, "weights", WEIGHTS, safetensors.torch.load)
    # Building draws initial weights, which must not change the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        model = build_model(parts["architecture"])
    _check_weights(folder / WEIGHTS, weights, model.state_dict())
    model.load_state_dict(weights)
    canary = None
    if manifest["canary"] is not None:
        tensors = _read_tensors(folder, manifest, "canary", CANARY, safetensors.numpy.load)
        taxonomy, stored_px = parts["taxonomy"], parts["preprocessing"].stored_px
        try:
            canary = canary_from_tensors(tensors, stored_px, taxonomy.num_emotions, taxonomy.num_action_units)
        except ValueError as error:
            raise BundleError(f"{folder / CANARY}: {error}. Get the bundle again.") from None
    sha256 = manifest["weights"]["sha256"]
    return Bundle(model.eval().requires_grad_(False), **parts, weights_sha256=sha256, path=name, canary=canary)


def _check_weights(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise BundleError(
            f"{path}: {len(missing)} tensors are missing ({_few(missing)}) and {len(unknown)} are unknown "
            f"({_few(unknown)}): the weights belong to another architecture. Get the bundle again."
        )
    for name, tensor in found.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise BundleError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}; the architecture has {wanted.dtype} "
                f"{tuple(wanted.shape)}. Get the bundle again."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise BundleError(
                f"{path}: {name} has {count:,} values that are NaN or infinite: its training diverged. Use another "
                "bundle."
            )


def _check_fit(where: str, parts: Mapping[str, Any]) -> None:
    """BundleError where parts differ in the number of outputs or pixels."""
    taxonomy, architecture, calibration = parts["taxonomy"], parts["architecture"], parts["calibration"]
    association, drift_reference = parts["association"], parts["drift_reference"]
    pairs = [
        ("architecture.num_emotions", architecture.num_emotions, taxonomy.num_emotions),
        ("architecture.num_action_units", architecture.num_action_units, taxonomy.num_action_units),
        ("number of calibration.au_thresholds", len(calibration.au_thresholds), taxonomy.num_action_units),
        ("preprocessing.image_px", parts["preprocessing"].image_px, architecture.image_px),
    ]
    if association is not None:
        pairs += [
            ("number of association.given_emotion", len(association.given_emotion), taxonomy.num_emotions),
            ("number of association.overall", len(association.overall), taxonomy.num_action_units),
        ]
    if drift_reference is not None:
        pairs += [
            ("number of drift_reference.emotions", len(drift_reference.emotions), taxonomy.num_emotions),
            ("number of drift_reference.action_units", len(drift_reference.action_units), taxonomy.num_action_units),
        ]
    for what, found, expected in pairs:
        if found != expected:
            raise BundleError(
                f"{where}: {what} is {found}, but {expected} is expected by the rest. Get or make the bundle again."
            )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"
