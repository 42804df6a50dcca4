"""Bundles: what is saved is what is loaded, and everything else is refused with the reason."""

import json
import pickle
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.bundle.bundle import BundleError, canary_of, load_bundle, read_weights, save_bundle
from rafce_ray.bundle.canary import largest_difference
from rafce_ray.faces.preprocess import Preprocessing, preprocess
from rafce_ray.metrics.calibration import Calibration
from rafce_ray.metrics.drift import Bins, DriftReference
from rafce_ray.model.network import Architecture, build_model, freeze_stages

TAXONOMY = make_taxonomy(("happily surprised", "calm", "sadly angry"), (1, 12))
ARCHITECTURE = Architecture(
    backbone="mobilenet_v3_small",
    image_px=32,
    num_emotions=3,
    num_action_units=2,
    compositional_head=True,
    components=((3, 0), None, (4, 5)),
    num_basic=6,
)
REFERENCE = DriftReference(
    num_images=5,
    emotions=(2, 0, 3),
    action_units=(1, 5),
    confidence=Bins((0.25, 1 / 3), (1, 1, 3)),
    brightness=Bins((0.1 + 0.2,), (0, 5)),
    contrast=Bins((33.3,), (4, 1)),
)
PARTS = {
    "architecture": ARCHITECTURE,
    "taxonomy": TAXONOMY,
    "preprocessing": Preprocessing(40, 32),
    "calibration": Calibration(1.5, (0.25, 0.75)),
    "drift_reference": REFERENCE,
    "metrics": {"accuracy": 0.5, "component_accuracy": float("nan")},
    "provenance": {"seed": 3, "config": {"data": {"root": None}}},
}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(ARCHITECTURE)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, model: torch.nn.Module) -> Path:
    path = tmp_path_factory.mktemp("original") / "bundle"
    save_bundle(path, model=model, **PARTS)
    return path


@pytest.fixture
def bundle(tmp_path: Path, original: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(original, tmp_path / "bundle")


def edit(bundle: Path, change) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    change(manifest)
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def replace_weights(bundle: Path, change) -> None:
    """Other weights with a manifest that fits them."""
    weights = safetensors.torch.load_file(bundle / "model.safetensors")
    change(weights)
    content = safetensors.torch.save(weights)
    (bundle / "model.safetensors").write_bytes(content)
    edit(
        bundle, lambda manifest: manifest["weights"].update(num_bytes=len(content), sha256=sha256(content).hexdigest())
    )


def refused(bundle: Path, reason: str) -> None:
    with pytest.raises(BundleError, match=reason) as caught:
        load_bundle(bundle)
    assert str(bundle) in str(caught.value)


def test_what_is_saved_is_loaded(bundle, model):
    before = torch.get_rng_state()
    loaded = load_bundle(bundle)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.path == str(bundle)
    assert loaded.weights_sha256 == sha256((bundle / "model.safetensors").read_bytes()).hexdigest()
    for part in ("architecture", "taxonomy", "preprocessing", "calibration", "drift_reference", "provenance"):
        assert getattr(loaded, part) == PARTS[part]
    assert loaded.metrics == {"accuracy": 0.5, "component_accuracy": None}
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    of_model, read = loaded.model.state_dict(), read_weights(bundle)
    for name, tensor in model.state_dict().items():
        assert torch.equal(of_model[name], tensor)
        assert torch.equal(read[name], tensor)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded.model(images).emotion, model.eval()(images).emotion)


def test_the_canary_is_what_torch_answers(bundle, model):
    canary = load_bundle(bundle).canary
    assert canary.images.shape == (4, 40, 40, 3)
    with torch.inference_mode():
        logits = model.eval()(preprocess(torch.from_numpy(canary.images), PARTS["preprocessing"]))
    np.testing.assert_allclose(canary.outputs.emotion, logits.emotion, atol=1e-6)
    np.testing.assert_allclose(canary.outputs.action_units, logits.action_units, atol=1e-6)


def test_saving_leaves_the_model_and_the_random_numbers_as_they_were(tmp_path):
    model = build_model(ARCHITECTURE).train()
    freeze_stages(model, None)
    model.au_head.weight.grad = torch.ones_like(model.au_head.weight)
    modes = {name: layer.training for name, layer in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    save_bundle(tmp_path / "bundle", model=model, **PARTS)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: layer.training for name, layer in model.named_modules()} == modes
    assert set(modes.values()) == {True, False}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [name for name, weight in model.named_parameters() if weight.grad is not None] == ["au_head.weight"]


def test_without_a_canary(tmp_path, bundle, model):
    save_bundle(tmp_path / "plain", model=model, with_canary=False, **PARTS)
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["bundle.json", "model.safetensors"]
    plain, stored = load_bundle(tmp_path / "plain"), load_bundle(bundle)
    assert plain.canary is None
    assert canary_of(stored) is stored.canary
    computed = canary_of(plain)
    np.testing.assert_array_equal(computed.images, stored.canary.images)
    assert largest_difference(computed.outputs, stored.canary.outputs, stored.calibration) <= 1e-6


def test_a_canary_cut_short_altered_or_missing(bundle):
    path = bundle / "canary.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    refused(bundle, "canary.safetensors: has .* cut short")
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(bundle, "canary.safetensors: was altered")
    path.unlink()
    refused(bundle, "canary.safetensors: cannot be read")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.update(images=c["images"][:, :30]), r"images uint8 \(4, 30, 40, 3\).*expected .*\(4, 40, 40, 3\)"),
        (lambda c: c.update(emotion=c["emotion"][:, :2]), r"emotion float32 \(4, 2\)"),
        (lambda c: c.update(action_units=c["action_units"].double()), "action_units float64"),
        (lambda c: c.update(images=c["images"].int()), "images int32"),
        (lambda c: c.pop("emotion"), "at least one image"),
        (lambda c: c.clear(), "holds nothing"),
        (lambda c: c.update({name: values[:0] for name, values in c.items()}), "at least one image"),
        (lambda c: c["emotion"].fill_(float("nan")), "outputs that are NaN or infinite"),
    ],
)
def test_canaries_that_are_refused(bundle, change, reason):
    path = bundle / "canary.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    content = safetensors.torch.save({name: values.contiguous() for name, values in tensors.items()})
    path.write_bytes(content)
    edit(bundle, lambda m: m["canary"].update(num_bytes=len(content), sha256=sha256(content).hexdigest()))
    refused(bundle, reason)


def test_names_stand_beside_codes(bundle):
    taxonomy = json.loads((bundle / "bundle.json").read_text())["taxonomy"]
    assert taxonomy["emotions"][0] == {"index": 0, "label": "happily surprised", "components": ["happy", "surprised"]}
    assert taxonomy["action_units"][1] == {"code": "AU12", "name": "Lip corner puller"}


def test_the_same_weights_have_the_same_sha256(tmp_path, model):
    sums = {save_bundle(tmp_path / str(turn), model=model, **PARTS) for turn in range(2)}
    model.to(memory_format=torch.channels_last)
    sums.add(save_bundle(tmp_path / "channels_last", model=model, **PARTS))
    model.to(memory_format=torch.contiguous_format)
    assert len(sums) == 1


def test_a_run_folder_and_a_uri_lead_to_the_bundle(bundle):
    assert load_bundle(bundle.parent).path == str(bundle)
    assert load_bundle(f"file://{bundle}").taxonomy == TAXONOMY


def test_never_overwritten_and_nothing_left_half_made(bundle, model, monkeypatch):
    before = (bundle / "bundle.json").read_bytes()
    with pytest.raises(BundleError, match="never overwritten"):
        save_bundle(bundle, model=model, **PARTS)
    assert (bundle / "bundle.json").read_bytes() == before

    def fails(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="disk full"):
        save_bundle(bundle.parent / "other", model=model, **PARTS)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("taxonomy", make_taxonomy(("a", "b"), (1, 12)), r"num_emotions is 3, but 2"),
        ("taxonomy", make_taxonomy(TAXONOMY.emotions, (1, 2, 12)), r"num_action_units is 2, but 3"),
        ("calibration", Calibration(1.0, (0.5,)), r"au_thresholds is 1, but 2"),
        ("preprocessing", Preprocessing(40, 64), r"image_px is 64, but 32"),
    ],
)
def test_parts_that_do_not_fit_are_not_saved(tmp_path, model, part, value, reason):
    with pytest.raises(BundleError, match=reason):
        save_bundle(tmp_path / "bundle", model=model, **(PARTS | {part: value}))
    assert not (tmp_path / "bundle").exists()


def test_no_bundle(tmp_path, bundle):
    with pytest.raises(BundleError, match="nothing is there"):
        load_bundle(tmp_path / "nowhere")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(BundleError, match="did not finish"):
        load_bundle(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").rmdir()
    with pytest.raises(BundleError, match="is no bundle"):
        load_bundle(tmp_path / "run")
    (bundle / "model.safetensors").unlink()
    refused(bundle, "model.safetensors: cannot be read")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(format_version=5), "format_version is 5; this program reads 1 to 4"),
        (lambda m: m.update(format_version="3"), "format_version is '3'"),
        (lambda m: m.pop("canary"), r"missing keys \['canary'\]"),
        (lambda m: m["canary"].pop("num_bytes"), "canary cannot be read: .*num_bytes"),
        (
            lambda m: m["canary"].update(file="model.safetensors"),
            "canary.file is 'model.safetensors', expected 'canary",
        ),
        (lambda m: m.pop("drift_reference"), r"missing keys \['drift_reference'\]"),
        (lambda m: m["drift_reference"].update(num_images=6), "drift_reference cannot be read: .*counts of 6 images"),
        (lambda m: m["drift_reference"].update(photo="..."), "drift_reference cannot be read: .*photo"),
        (lambda m: m["drift_reference"]["action_units"].pop(), "drift_reference.action_units is 1, but 2"),
        (lambda m: m.pop("format_version"), "format_version is None"),
        (lambda m: m.pop("calibration"), r"missing keys \['calibration'\]"),
        (lambda m: m.update(extra=1), r"unknown keys \['extra'\]"),
        (lambda m: m["architecture"].pop("backbone"), "architecture cannot be read: .*backbone"),
        (lambda m: m["architecture"].update(backbone="resnet9000"), "architecture cannot be read: .*resnet9000"),
        (lambda m: m["architecture"].update(surprise=1), "architecture cannot be read: .*surprise"),
        (lambda m: m["taxonomy"].pop("emotions"), "taxonomy cannot be read: .*emotions"),
        (lambda m: m["taxonomy"]["emotions"].pop(1), "indices of the emotions"),
        (lambda m: m["taxonomy"]["action_units"][0].update(code="smile"), "not all action units"),
        (lambda m: m["taxonomy"]["action_units"].pop(), "num_action_units is 2, but 1"),
        (lambda m: m["preprocessing"].update(mean=[0.5]), "preprocessing cannot be read: mean"),
        (lambda m: m["preprocessing"].update(stored_px="large"), "preprocessing cannot be read: stored_px"),
        (lambda m: m["preprocessing"].pop("stored_px"), "preprocessing cannot be read: stored_px"),
        (lambda m: m["calibration"].update(temperature=0), "temperature: Input should be greater than 0"),
        (lambda m: m["calibration"].update(temperature="warm"), "calibration cannot be read: temperature"),
        (
            lambda m: m["calibration"].update(au_thresholds=[0.5, 1.5]),
            r"au_thresholds.1: Input should be less",
        ),
        (lambda m: m["calibration"].update(slope=[1, 1]), "calibration cannot be read: slope"),
        (lambda m: m["weights"].pop("sha256"), "weights cannot be read: .*sha256"),
        (lambda m: m["weights"].update(file="../other"), "expected 'model.safetensors'"),
        (lambda m: m.update(weights=None), "weights cannot be read"),
    ],
)
def test_manifests_that_are_refused(bundle, change, reason):
    edit(bundle, change)
    refused(bundle, reason)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_manifest_cut_short(bundle, content):
    (bundle / "bundle.json").write_bytes(content)
    refused(bundle, "bundle.json")


def test_weights_cut_short_or_altered(bundle):
    content = (bundle / "model.safetensors").read_bytes()
    (bundle / "model.safetensors").write_bytes(content[:-100])
    refused(bundle, "cut short")
    (bundle / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(bundle, "was altered: sha256")
    with pytest.raises(BundleError, match="was altered"):
        read_weights(bundle)
    junk = b"junk" * 100
    (bundle / "model.safetensors").write_bytes(junk)
    edit(bundle, lambda m: m["weights"].update(num_bytes=len(junk), sha256=sha256(junk).hexdigest()))
    refused(bundle, "is no safetensors file")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w["au_head.bias"].__setitem__(0, float("nan")), r"au_head.bias has 1 values that are NaN"),
        (lambda w: w["au_head.weight"].fill_(float("inf")), r"au_head.weight has 1,152 values"),
        (lambda w: w.update({"au_head.bias": torch.zeros(3)}), r"au_head.bias is torch.float32 \(3,\)"),
        (lambda w: w.update({"au_head.bias": torch.zeros(2).half()}), r"au_head.bias is torch.float16"),
        (lambda w: w.pop("au_head.bias"), r"1 tensors are missing \(au_head.bias\)"),
        (lambda w: w.update({"other": torch.zeros(1)}), r"1 are unknown \(other\)"),
    ],
)
def test_weights_that_are_refused(bundle, change, reason):
    replace_weights(bundle, change)
    refused(bundle, reason)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.pt", b"anything"),
        ("model.bin", b"anything"),
        ("below/model.pkl", b""),
        ("notes.txt", pickle.dumps({"a": 1})),
        ("archive", b"PK\x03\x04rest"),
    ],
)
def test_a_pickle_inside(bundle, name, content):
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(content)
    refused(bundle, "looks like a pickle")


def test_other_files_do_no_harm(bundle):
    (bundle / "README.md").write_text("what this model is for")
    assert load_bundle(bundle).taxonomy == TAXONOMY


@pytest.mark.parametrize("task", ["emotions", "action_units"])
def test_a_single_task(tmp_path, task):
    taxonomy = make_taxonomy(("calm", "glad"), ()) if task == "emotions" else make_taxonomy((), (12,))
    architecture = Architecture(
        "mobilenet_v3_small", 32, taxonomy.num_emotions, taxonomy.num_action_units, components=taxonomy.components
    )
    parts = {"architecture": architecture, "taxonomy": taxonomy, "drift_reference": None}
    parts["calibration"] = Calibration.uncalibrated(taxonomy.num_action_units)
    save_bundle(tmp_path / "bundle", model=build_model(architecture), **(PARTS | parts))
    loaded = load_bundle(tmp_path / "bundle")
    assert (loaded.taxonomy, loaded.architecture) == (taxonomy, replace(architecture))
    assert loaded.calibration.au_thresholds == (0.5,) * taxonomy.num_action_units
    shapes = (loaded.canary.outputs.emotion.shape, loaded.canary.outputs.action_units.shape)
    assert shapes == ((4, taxonomy.num_emotions), (4, taxonomy.num_action_units))
