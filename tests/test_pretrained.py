"""Weights files that fit, and every way in which one may not."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import ResNet18_Weights, get_model

from rafce_ray.base.errors import UsageError
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.config import ModelConfig
from rafce_ray.faces.preprocess import Preprocessing, preprocess
from rafce_ray.model.backbones import efficientnet_lite0, normalisation_of
from rafce_ray.model.network import MultiTaskModel, build_architecture, build_model, load_backbone_weights
from rafce_ray.model.pretrained import PACKAGES, WeightsError, read_tensors

TAXONOMY = make_taxonomy(("happily surprised", "sadly angry"), (1, 12))


def fresh_model(backbone: str = "resnet18", image_px: int = 64) -> MultiTaskModel:
    return deepcopy(first_model(backbone, image_px))


@cache
def first_model(backbone: str, image_px: int) -> MultiTaskModel:
    """Drawing eleven million initial weights takes longer than copying them."""
    torch.manual_seed(1)
    return build_model(build_architecture(ModelConfig(backbone=backbone, image_px=image_px), TAXONOMY))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """torchvision's resnet18, as it would be trained: batch statistics that fit normalised images."""
    torch.manual_seed(2)
    network = get_model("resnet18", weights=None).train()
    with torch.no_grad():
        for _ in range(30):
            network(torch.randn(4, 3, 32, 32))
    return network.state_dict()


def save(content: object, path: Path) -> str:
    torch.save(content, path)
    return str(path)


def assert_loaded(model: MultiTaskModel, weights: dict[str, Tensor]) -> None:
    for key, value in model.trunk.body.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_none_loads_nothing():
    model = fresh_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_backbone_weights(model, "none")
    assert (report.source, report.loaded, report.coverage) == ("none", 0, 0.0)
    assert "from scratch" in report.summary
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.model.{key}": value for key, value in state.items()}, "epoch": 3},
        lambda state: {"model": {f"_orig_mod.backbone.{key}": value for key, value in state.items()}, "best": 0.5},
        lambda state: {"optimizer": {}, "model": {"state_dict": state}},
        lambda state: {f"trunk.body.{key}": value for key, value in state.items()},
    ],
)
def test_wrappers_and_prefixes_are_seen_through(wrap, weights: dict[str, Tensor], tmp_path: Path):
    model = fresh_model()
    report = load_backbone_weights(model, save(wrap(weights), tmp_path / "weights.pt"))
    assert_loaded(model, weights)
    assert (report.coverage, report.missing, report.unexpected, report.num_head_tensors) == (1.0, (), (), 2)
    assert "100.0%" in report.summary
    assert "2 of its classifier left out" in report.summary


def test_safetensors_and_half_precision(weights: dict[str, Tensor], tmp_path: Path):
    model = fresh_model()
    halves = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    save_file({key: value.contiguous() for key, value in halves.items()}, tmp_path / "weights.safetensors")
    load_backbone_weights(model, str(tmp_path / "weights.safetensors"))
    assert model.trunk.body["conv1"].weight.dtype == torch.float32
    assert_loaded(model, {key: value.to(weights[key].dtype) for key, value in halves.items()})


def test_batch_counters_may_be_missing(weights: dict[str, Tensor], tmp_path: Path):
    kept = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    report = load_backbone_weights(fresh_model(), save(kept, tmp_path / "weights.pt"))
    assert (report.coverage, report.missing) == (1.0, ())


def test_a_little_may_be_missing_and_is_said(weights: dict[str, Tensor], tmp_path: Path):
    changed = {key: value for key, value in weights.items() if not key.startswith("layer1.0.bn1")}
    changed["layer9.extra"] = torch.zeros(1)
    report = load_backbone_weights(fresh_model(), save(changed, tmp_path / "weights.pt"))
    assert 0.9 < report.coverage < 1
    assert "layer1.0.bn1.weight" in report.missing
    assert report.unexpected == ("layer9.extra",)
    assert "4 missing (layer1.0.bn1.weight" in report.summary
    assert "1 unused (layer9.extra)" in report.summary


@pytest.mark.parametrize(
    "dropped",
    [
        "running",  # batch statistics: few numbers, but a fifth of the tensors
        "layer4.1.conv",  # two tensors of 62, but 40 % of the numbers
    ],
)
def test_too_little_is_refused(dropped: str, weights: dict[str, Tensor], tmp_path: Path):
    kept = {key: value for key, value in weights.items() if dropped not in key}
    model = fresh_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"fills \d\d\.\d% of the trunk.*Missing: .*" + dropped.replace(".", r"\.")):
        load_backbone_weights(model, save(kept, tmp_path / "weights.pt"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_another_depth_is_refused(weights: dict[str, Tensor], tmp_path: Path):
    with pytest.raises(WeightsError, match=r"weights\.pt for model\.backbone=resnet34: the file fills 52\.5%"):
        load_backbone_weights(fresh_model("resnet34"), save(weights, tmp_path / "weights.pt"))
    with pytest.raises(WeightsError, match="Missing: features"):
        load_backbone_weights(fresh_model("mobilenet_v3_small"), save(weights, tmp_path / "weights.pt"))


def test_other_shapes_are_refused(weights: dict[str, Tensor], tmp_path: Path):
    changed = dict(weights, **{"conv1.weight": torch.zeros(64, 1, 7, 7)})
    with pytest.raises(WeightsError, match=r"conv1\.weight \(64, 1, 7, 7\) for \(64, 3, 7, 7\)"):
        load_backbone_weights(fresh_model(), save(changed, tmp_path / "weights.pt"))


def test_numbers_that_are_not_finite_are_refused(weights: dict[str, Tensor], tmp_path: Path):
    changed = dict(weights, **{"layer1.0.conv1.weight": weights["layer1.0.conv1.weight"] / 0})
    with pytest.raises(WeightsError, match=r"1 tensors hold NaN or infinity, such as layer1\.0\.conv1\.weight"):
        load_backbone_weights(fresh_model(), save(changed, tmp_path / "weights.pt"))


def test_two_networks_in_one_file_are_refused(weights: dict[str, Tensor], tmp_path: Path):
    both = weights | {f"module.{key}": value for key, value in weights.items()}
    with pytest.raises(WeightsError, match="more than one network"):
        load_backbone_weights(fresh_model(), save(both, tmp_path / "weights.pt"))


@pytest.mark.slow
def test_a_network_for_pixels_up_to_255_is_refused(weights: dict[str, Tensor], tmp_path: Path):
    """The VGGFace2 trap: same keys, same shapes, other inputs. Its batch statistics give it away."""
    torch.manual_seed(2)
    network = get_model("resnet18", weights=None).train()
    with torch.no_grad():
        for _ in range(30):
            network(torch.randint(0, 256, (4, 3, 32, 32)).float() - 120)
    with pytest.raises(WeightsError, match="trained on pixels of 0-255"):
        load_backbone_weights(fresh_model(), save(network.state_dict(), tmp_path / "weights.pt"))


def test_vggface2_classifiers_are_refused_or_warned_of(weights: dict[str, Tensor], tmp_path: Path):
    identities = dict(weights, **{"fc.weight": torch.zeros(8631, 512), "fc.bias": torch.zeros(8631)})
    report = load_backbone_weights(fresh_model(), save(identities, tmp_path / "pytorch.pt"))
    assert "VGGFace2" in report.warnings[0]
    assert report.warnings[0] in report.summary
    converted = {key: value for key, value in identities.items() if not key.endswith("num_batches_tracked")}
    with pytest.raises(WeightsError, match="conversion from Caffe"):
        load_backbone_weights(fresh_model(), save(converted, tmp_path / "caffe.pt"))


def test_caffe_names_are_recognised(tmp_path: Path):
    path = save({"conv1_7x7_s2.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match="The names are Caffe's"):
        load_backbone_weights(fresh_model(), path)


def test_a_pickle_is_not_opened(tmp_path: Path):
    with pytest.raises(WeightsError, match="pickled objects"):
        load_backbone_weights(fresh_model(), save(torch.nn.Linear(1, 1), tmp_path / "weights.pt"))


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_damaged_file_is_refused(name: str, weights: dict[str, Tensor], tmp_path: Path):
    path = tmp_path / name
    if name.endswith("pt"):
        save(weights, path)
    else:
        save_file({key: value.contiguous() for key, value in weights.items()}, path)
    whole = path.read_bytes()
    for content in (b"", b"no weights", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(WeightsError):
            load_backbone_weights(fresh_model(), str(path))


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"lr": 0.1}}])
def test_a_file_without_tensors_is_refused(content: object, tmp_path: Path):
    with pytest.raises(WeightsError, match="no tensors by name"):
        load_backbone_weights(fresh_model(), save(content, tmp_path / "weights.pt"))


def test_a_missing_file_and_an_unknown_name_are_usage_errors(tmp_path: Path):
    with pytest.raises(UsageError, match="there is no file"):
        load_backbone_weights(fresh_model(), str(tmp_path / "weights.pt"))
    with pytest.raises(UsageError, match="there is no file"):
        load_backbone_weights(fresh_model(), f"{'x' * 300}.pt")
    with pytest.raises(UsageError, match="IMAGENET1K_V1"):
        load_backbone_weights(fresh_model(), "IMAGENET")


def test_torchvision_names_are_read_from_its_cache(
    weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    save(weights, folder / ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1])
    model = fresh_model()
    report = load_backbone_weights(model, "DEFAULT")
    assert report.source == "DEFAULT"
    assert_loaded(model, weights)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub, and no network: a proxy that nobody listens on. The folder of cached files."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.usefixtures("offline")
def test_a_failed_download_names_the_remedies():
    with pytest.raises(WeightsError, match=r"(?s)resnet18-f37072fd\.pth could not be downloaded .*model\.weights=none"):
        load_backbone_weights(fresh_model(), "DEFAULT")


def test_lite0_classifies_a_photograph_as_it_was_trained():
    """Keys, activations and normalisation of the package's weights, by the class that its own classifier finds.

    With ImageNet's normalisation instead of its own the first class is the bow tie.
    """
    network = efficientnet_lite0().eval()
    found = read_tensors(PACKAGES["efficientnet_lite0"].find())
    network.load_state_dict(dict(zip(network.state_dict(), found.values(), strict=True)))
    photo = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    photo = photo.crop((0, 0, photo.width, photo.width)).resize((224, 224))
    pixels = torch.from_numpy(np.array(photo))[None]
    how = Preprocessing(224, 224, *normalisation_of("efficientnet_lite0"))
    with torch.inference_mode():
        best = int(network(preprocess(pixels, how)).argmax())
    assert ResNet18_Weights.DEFAULT.meta["categories"][best] == "military uniform"


@pytest.mark.parametrize("backbone", PACKAGES)
def test_a_package_fills_the_whole_trunk(backbone: str):
    model = fresh_model(backbone)
    report = load_backbone_weights(model, "package")
    assert (report.coverage, report.missing, report.unexpected) == (1.0, (), ())
    assert report.source == f"package {PACKAGES[backbone].distribution} {PACKAGES[backbone].version}"
    found = read_tensors(PACKAGES[backbone].find())
    first = model.trunk.body["features"][0][0].weight
    assert torch.equal(first, next(iter(found.values())))


@pytest.mark.slow
def test_vision_transformer_of_another_image_size_and_old_names(tmp_path: Path):
    network = get_model("vit_b_16", weights=None, image_size=96)
    old = {
        key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): value
        for key, value in network.state_dict().items()
    }
    model = fresh_model("vit_b_16", image_px=64)
    report = load_backbone_weights(model, save(old, tmp_path / "weights.pt"))
    assert report.coverage == 1.0
    assert model.trunk.body.encoder.pos_embedding.shape == (1, 17, 768)
    same = fresh_model("vit_b_16", image_px=96)
    load_backbone_weights(same, str(tmp_path / "weights.pt"))
    assert_loaded(same, network.state_dict())
