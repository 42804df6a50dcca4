"""A bundle: all that is needed to predict, and nothing else, in one folder without any pickle.

``model.safetensors`` holds the weights, ``canary.safetensors`` a few images with the answers that torch gave for them.
``bundle.json`` holds the sha256 of both, the architecture, the taxonomy with names, the preprocessing, the calibration,
the association of emotions and action units, the reference that drift is told by, metrics and provenance.
``MODEL_CARD.md`` tells people.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
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
from rafce_ray.base.storage import Location, StorageError, locate
from rafce_ray.base.taxonomy import ACTION_UNIT_NAMES, Taxonomy, action_unit_code, parse_action_unit_token
from rafce_ray.bundle.canary import Canary, canary_from_tensors, canary_to_bytes, draw_canary
from rafce_ray.faces.preprocess import Preprocessing
from rafce_ray.metrics.calibration import Calibration
from rafce_ray.metrics.consistency import Association
from rafce_ray.metrics.drift import DriftReference
from rafce_ray.model.network import Architecture, MultiTaskModel, build_model

FORMAT_VERSION = 4
"""Version of the layout that this code writes.

It also reads version 1, which had no association, 2, which had no canary, and 3, which had no reference for drift."""

MANIFEST = "bundle.json"
WEIGHTS = "model.safetensors"
CANARY = "canary.safetensors"
MODEL_CARD = "MODEL_CARD.md"

Record = TypeVar("Record")

_KEYS = frozenset(
    {
        "format_version",
        "weights",
        "canary",
        "taxonomy",
        "architecture",
        "preprocessing",
        "calibration",
        "association",
        "drift_reference",
        "metrics",
        "provenance",
    }
)
_PICKLE_SUFFIXES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz"})
_PICKLE_STARTS = (*(b"\x80" + bytes([protocol]) for protocol in range(2, 6)), b"PK\x03\x04")


class BundleError(RafceError):
    """A folder is no bundle that may be used; the message says which file, what was found and what was expected."""


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
    """``bundle.json`` with the keys of the newest version. BundleError where it cannot be read, or has other keys."""
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
    version = manifest.get("format_version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise BundleError(
            f"{path}: format_version is {version!r}; this program reads 1 to {FORMAT_VERSION}. "
            "Use the version of rafce_ray that wrote it, or train again."
        )
    if version == 1:
        manifest.setdefault("association", None)
    if version in (1, 2):
        manifest.setdefault("canary", None)
    if version in (1, 2, 3):
        manifest.setdefault("drift_reference", None)
    if manifest.keys() != _KEYS:
        missing, unknown = sorted(_KEYS - manifest.keys()), sorted(manifest.keys() - _KEYS)
        raise BundleError(
            f"{path}: missing keys {missing}, unknown keys {unknown}. Get the bundle again from its source."
        )
    return manifest


def section(folder: Path, manifest: Mapping[str, Any], key: str, read: Callable[[Any], Record]) -> Record:
    """One section of the manifest as its record; whatever does not fit is a BundleError that names file and key."""
    try:
        return read(manifest[key])
    except (ValidationError, TypeError, ValueError, KeyError, IndexError) as error:
        reason = repr(error)
        if isinstance(error, ValidationError):
            reason = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise BundleError(
            f"{folder / MANIFEST}: {key} cannot be read: {reason}. Get the bundle again from its source."
        ) from None


def describe_file(name: str, content: bytes) -> dict[str, Any]:
    """The entry of a file in the manifest."""
    return {"file": name, "num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read_file(folder: Path, manifest: Mapping[str, Any], key: str, name: str) -> bytes:
    """The content of the file that the manifest's ``key`` describes, which must be called ``name``, after its sha256
    was checked.

    Raises:
        BundleError: it cannot be read, or is not the one that the manifest describes.
    """
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
    return content


def taxonomy_to_plain(taxonomy: Taxonomy) -> dict[str, Any]:
    """A taxonomy as plain JSON values, names beside codes."""
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
    """The taxonomy that :func:`taxonomy_to_plain` wrote. ValueError, TypeError or KeyError where it cannot be read."""
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


__all__ = [
    "MANIFEST",
    "MODEL_CARD",
    "WEIGHTS",
    "Bundle",
    "BundleError",
    "canary_of",
    "find_bundle",
    "load_bundle",
    "read_taxonomy",
    "read_weights",
    "save_bundle",
]


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle; ``model`` is in evaluation mode on the CPU, ``path`` is where the bundle was read from.

    ``canary`` is None where the bundle was written without one: see :func:`canary_of`. ``drift_reference`` is None in
    bundles of earlier versions and in those that nothing was measured of, such as a checkpoint's.
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
    """Write a bundle; the folder, which must be new, appears whole or not at all.

    Returns the sha256 of the weights file.

    ``metrics`` and ``provenance`` hold plain JSON values; NaN becomes null. ``model_card`` is Markdown. ``with_canary``
    runs a copy of the model on the CPU once, in evaluation mode; nothing random is drawn, and the model is left as it
    was.

    Raises:
        BundleError: the folder exists, or taxonomy, architecture, preprocessing and calibration do not fit together.
    """
    if folder.exists():
        raise BundleError(
            f"{folder}: exists already, and a bundle is never overwritten. Choose another place or remove it."
        )
    _check_fit(str(folder), architecture, taxonomy, preprocessing, calibration, association, drift_reference)
    # safetensors wants plain memory layout; the values are unchanged.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    contents = {WEIGHTS: safetensors.torch.save(tensors)}
    if with_canary:
        contents[CANARY] = canary_to_bytes(draw_canary(model, preprocessing))
    weights = describe_file(WEIGHTS, contents[WEIGHTS])
    manifest = {
        "format_version": FORMAT_VERSION,
        "weights": weights,
        "canary": describe_file(CANARY, contents[CANARY]) if with_canary else None,
        "taxonomy": taxonomy_to_plain(taxonomy),
        "architecture": architecture.to_plain(),
        "preprocessing": asdict(preprocessing),
        "calibration": asdict(calibration),
        "association": None if association is None else asdict(association),
        "drift_reference": None if drift_reference is None else asdict(drift_reference),
        "metrics": dict(metrics),
        "provenance": dict(provenance),
    }
    contents[MANIFEST] = (json.dumps(finite(manifest), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    if model_card is not None:
        contents[MODEL_CARD] = model_card.encode()
    _write_folder(folder, contents)
    return str(weights["sha256"])


def _write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Files in a new folder, which appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        beside.mkdir()
        for name, content in contents.items():
            _write_durably(beside / name, content)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load_bundle(place: str | Path) -> Bundle:
    """Read a bundle from a local folder or a URI; ``place`` may also be a run folder, whose ``bundle/`` is then read.

    Raises:
        BundleError: there is none, or it may not be used: unknown version, missing or unknown keys, weights cut short,
            altered, of other names, shapes or types than the architecture's, or not finite, a canary likewise, or a
            pickle in the folder.
    """
    location = find_bundle(place)
    local = location.local
    if local is not None:
        return _load(local, str(location))
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "bundle"
        location.download(copy)
        return _load(copy, str(location))


def find_bundle(place: str | Path) -> Location:
    """The bundle folder at ``place`` or, where that is a run folder, in its ``bundle/``.

    BundleError where there is none.
    """
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
    what = (
        "is no bundle: there is no bundle.json in it, nor in a bundle/ below it"
        if location.exists()
        else "nothing is there"
    )
    raise BundleError(f"{location}: {what}. Give the bundle folder that training printed, or its run folder.")


def canary_of(bundle: Bundle) -> Canary:
    """The bundle's canary or, where it was written without one, the one that torch gives now."""
    return bundle.canary or draw_canary(bundle.model, bundle.preprocessing)


def read_taxonomy(location: Location) -> Taxonomy:
    """What the model of a bundle folder tells, from its manifest alone. BundleError where that cannot be read."""
    folder = location.local
    if folder is None:
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / MANIFEST).write_bytes((location / MANIFEST).read_bytes())
            return read_taxonomy(locate(scratch))
    return section(folder, read_manifest(folder), "taxonomy", taxonomy_from_plain)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a local bundle by name, on the CPU, after their sha256 was checked.

    Raises:
        BundleError: the manifest or the weights cannot be read, or the weights are not those of the manifest.
    """
    return _read_weights(folder, read_manifest(folder))


def _load(folder: Path, name: str) -> Bundle:
    refuse_pickles(folder)
    manifest = read_manifest(folder)
    architecture = section(folder, manifest, "architecture", Architecture.from_plain)
    taxonomy = section(folder, manifest, "taxonomy", taxonomy_from_plain)
    preprocessing = section(folder, manifest, "preprocessing", TypeAdapter(Preprocessing).validate_python)
    calibration = section(folder, manifest, "calibration", TypeAdapter(Calibration).validate_python)
    association = section(folder, manifest, "association", TypeAdapter(Association | None).validate_python)
    drift_reference = section(folder, manifest, "drift_reference", TypeAdapter(DriftReference | None).validate_python)
    _check_fit(str(folder / MANIFEST), architecture, taxonomy, preprocessing, calibration, association, drift_reference)
    weights = _read_weights(folder, manifest)
    # Building draws initial weights, which must not move the caller's random numbers on.
    with torch.random.fork_rng(devices=[]):
        model = build_model(architecture)
    _check_weights(folder / WEIGHTS, weights, model.state_dict())
    model.load_state_dict(weights)
    return Bundle(
        model=model.eval().requires_grad_(False),
        architecture=architecture,
        taxonomy=taxonomy,
        preprocessing=preprocessing,
        calibration=calibration,
        association=association,
        metrics=section(folder, manifest, "metrics", dict),
        provenance=section(folder, manifest, "provenance", dict),
        weights_sha256=manifest["weights"]["sha256"],
        path=name,
        canary=_read_canary(folder, manifest, preprocessing, taxonomy),
        drift_reference=drift_reference,
    )


def _read_weights(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    content = read_file(folder, manifest, "weights", WEIGHTS)
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(content)
    except Exception as error:
        raise BundleError(f"{folder / WEIGHTS}: is no safetensors file ({error}). Get the bundle again.") from None
    return tensors


def _read_canary(
    folder: Path, manifest: Mapping[str, Any], preprocessing: Preprocessing, taxonomy: Taxonomy
) -> Canary | None:
    if manifest["canary"] is None:
        return None
    content = read_file(folder, manifest, "canary", CANARY)
    try:
        tensors = safetensors.numpy.load(content)
    except Exception as error:
        raise BundleError(f"{folder / CANARY}: is no safetensors file ({error}). Get the bundle again.") from None
    try:
        return canary_from_tensors(tensors, preprocessing.stored_px, taxonomy.num_emotions, taxonomy.num_action_units)
    except ValueError as error:
        raise BundleError(f"{folder / CANARY}: {error}. Get the bundle again.") from None


def _check_weights(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Names, shapes, types and finiteness of the weights against the architecture's."""
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


def _check_fit(
    where: str,
    architecture: Architecture,
    taxonomy: Taxonomy,
    preprocessing: Preprocessing,
    calibration: Calibration,
    association: Association | None,
    drift_reference: DriftReference | None,
) -> None:
    """Whether the parts speak of the same numbers of outputs and pixels."""
    pairs = [
        ("architecture.num_emotions", architecture.num_emotions, taxonomy.num_emotions),
        ("architecture.num_action_units", architecture.num_action_units, taxonomy.num_action_units),
        ("number of calibration.au_thresholds", len(calibration.au_thresholds), taxonomy.num_action_units),
        ("preprocessing.image_px", preprocessing.image_px, architecture.image_px),
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


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"
