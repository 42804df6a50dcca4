"""Loads weights for the trunk from torchvision or from a file, and refuses weights that do not fit, with the reason.

Some weights load without an error and are still wrong: half of the keys are missing, the depth differs, or the network
was trained on other pixel values. The VGGFace2 ResNet-50 in Caffe's style is an example (BGR 0-255, stride on the 1x1
convolution): its keys and shapes are torchvision's.
"""

from __future__ import annotations

import math
import os
import pickle
import urllib.error
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_weights
from torchvision.models.vision_transformer import interpolate_embeddings

from rafce_ray.base.errors import RafceError, UsageError

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


class WeightsError(RafceError):
    """Weights cannot be read or downloaded, or do not fit this trunk."""


@dataclass(frozen=True)
class WeightsReport:
    """What was loaded into the trunk.

    ``loaded`` counts tensors, ``missing`` names trunk tensors that keep their fresh values, ``unexpected`` names file
    tensors that belong nowhere (heads are not counted as such, but as ``num_head_tensors``). ``coverage`` is the
    smaller of the shares of tensors and of numbers filled; 0 for ``source`` none. ``warnings`` are to be shown to the
    user.
    """

    source: str
    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    coverage: float
    num_head_tensors: int = 0
    warnings: tuple[str, ...] = ()

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
        return "; ".join([*parts, *self.warnings])


def load_weights(body: nn.Module, weights: str, *, backbone: str, image_px: int) -> WeightsReport:
    """Load ``weights`` into a trunk's ``body``, whose keys are torchvision's; see ``model.load_backbone_weights``."""
    if weights == "none":
        return WeightsReport("none", 0, (), (), 0.0)
    found = _read_file(Path(os.path.expanduser(weights))) if _is_file(weights) else _download(backbone, weights)
    renamed = {_torchvision_key(key): tensor for key, tensor in found.items()}
    if len(renamed) < len(found):
        raise WeightsError(
            f"model.weights={weights}: {len(found) - len(renamed)} keys are the same once prefixes such as 'module.' "
            "are taken off: the file holds more than one network. Save the one that is meant."
        )
    if backbone.startswith("vit"):
        renamed = _interpolated(renamed, image_px)
    return _load(body, renamed, weights, backbone)


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
    """Check that ``model.weights`` names an existing file or a torchvision name, before a study's trials start.

    Raises:
        UsageError: a file that is missing, or no name of torchvision's for this backbone.
    """
    if weights == "none":
        return
    if _is_file(weights):
        _existing(Path(os.path.expanduser(weights)))
    else:
        _known_name(backbone, weights)


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


def _read_file(path: Path) -> dict[str, Tensor]:
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
    choices = get_model_weights(backbone)
    if name not in choices.__members__:
        raise UsageError(
            f"model.weights: found {name!r}; expected none, a file, or one of torchvision's for {backbone}: "
            f"{', '.join(choices.__members__)}."
        )
    return choices[name]


def _download(backbone: str, name: str) -> dict[str, Tensor]:
    choice = _known_name(backbone, name)
    try:
        return dict(choice.get_state_dict(progress=False, check_hash=True))
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise WeightsError(
            f"model.weights={name}: {choice.url} could not be downloaded ({error}). Download it where there is a "
            "network, and give the file's path as model.weights; or train from scratch with model.weights=none."
        ) from None


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
