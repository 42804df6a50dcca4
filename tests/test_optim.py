"""Optimizer groups, schedule and averaged weights; everything comes back from a file bit for bit."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from rafce_ray.base.errors import UsageError
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.config import ModelConfig
from rafce_ray.model.network import build_architecture, build_model
from rafce_ray.model.optim import build_ema, build_optimizer, learning_rate

pytestmark = pytest.mark.numeric

TAXONOMY = make_taxonomy(("happily surprised", "sadly angry"), (1, 12))


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


def step(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    network(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_only_weights_of_maps_decay():
    architecture = build_architecture(ModelConfig(backbone="mobilenet_v3_small", au_attention=True), TAXONOMY)
    model = build_model(architecture)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = build_optimizer(model, "adamw", lr=1e-3, weight_decay=0.1).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    free_names = [names[id(parameter)] for parameter in free["params"]]
    assert all(name.endswith(("bias", "queries")) or "norm" in name or ".1." in name for name in free_names), free_names
    assert "au_attention.queries" in free_names
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert len(free_names) + len(decayed["params"]) == len(names)


@pytest.mark.parametrize("backbone", ["convnext_tiny", "vit_b_16"])
def test_scales_tokens_and_positions_do_not_decay(backbone: str):
    with torch.device("meta"):
        model = build_model(build_architecture(ModelConfig(backbone=backbone), TAXONOMY))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = build_optimizer(model, "sgd", lr=1e-3, weight_decay=0.1).param_groups[0]
    for parameter in decayed["params"]:
        assert not names[id(parameter)].endswith(("bias", "layer_scale", "class_token", "pos_embedding"))


def test_frozen_parameters_are_left_out():
    network = small_network()
    network[0].requires_grad_(False)
    optimizer = build_optimizer(network, "adamw", lr=1e-3, weight_decay=0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    with pytest.raises(UsageError, match="nothing is left to train"):
        build_optimizer(network.requires_grad_(False), "adamw", lr=1e-3, weight_decay=0.1)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adamw", lambda groups: torch.optim.AdamW(groups, lr=0.01)),
        ("adam", lambda groups: torch.optim.Adam(groups, lr=0.01)),
        ("sgd", lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)),
    ],
)
def test_updates_are_torchs(name: str, reference):
    ours, theirs = small_network(), small_network()
    optimizer = build_optimizer(ours, name, lr=0.01, weight_decay=0.1)
    conv, norm, _, linear = theirs
    groups = [
        {"params": [conv.weight, linear.weight], "weight_decay": 0.1},
        {"params": [conv.bias, norm.weight, norm.bias, linear.bias], "weight_decay": 0.0},
    ]
    other = reference(groups)
    for seed in range(3):
        step(ours, optimizer, seed)
        step(theirs, other, seed)
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        # A bias before a BatchNorm has a gradient of rounding errors, of which Adam makes full steps.
        if one.shape != conv.bias.shape:
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_a_saved_state_goes_on_bit_for_bit(name: str, tmp_path: Path):
    network = small_network()
    optimizer = build_optimizer(network, name, lr=0.01, weight_decay=0.1)
    ema = build_ema(network, 0.9)
    for seed in range(3):
        step(network, optimizer, seed)
        ema.update_parameters(network)
    torch.save(
        {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}, tmp_path / "s"
    )
    restored = small_network()
    optimizer_2, ema_2 = build_optimizer(restored, name, lr=0.5, weight_decay=0.5), build_ema(restored, 0.9)
    state = torch.load(tmp_path / "s", weights_only=True)
    restored.load_state_dict(state["model"])
    optimizer_2.load_state_dict(state["optimizer"])
    ema_2.load_state_dict(state["ema"])
    for seed in range(3, 6):
        step(network, optimizer, seed)
        ema.update_parameters(network)
        step(restored, optimizer_2, seed)
        ema_2.update_parameters(restored)
    for one, two in ((network, restored), (ema, ema_2)):
        for key, value in one.state_dict().items():
            assert torch.equal(value, two.state_dict()[key]), key


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UsageError, match="adamw, adam or sgd"):
        build_optimizer(small_network(), "lion", lr=1e-3, weight_decay=0.0)


def test_learning_rate_by_hand():
    def rate(step: int, schedule: str = "cosine") -> float:
        return learning_rate(step, total_steps=14, warmup_steps=4, lr=0.1, schedule=schedule)

    assert [rate(step) for step in range(4)] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rate(4) == pytest.approx(0.1)
    assert rate(9) == pytest.approx(0.05)
    assert rate(13) == pytest.approx(0.05 * (1 + math.cos(0.9 * math.pi)))
    assert rate(14) == rate(1000) == 0.0
    assert [rate(step, "constant") for step in (0, 4, 14)] == pytest.approx([0.025, 0.1, 0.1])


def test_learning_rate_without_warmup_is_torchs_cosine():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for step in range(20):
        ours = learning_rate(step, total_steps=20, warmup_steps=0, lr=0.3, schedule="cosine")
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UsageError, match="cosine or constant"):
        learning_rate(0, total_steps=1, warmup_steps=0, lr=0.1, schedule="step")


def test_average_follows_its_formula_for_weights_and_buffers():
    network = small_network()
    ema = build_ema(network, 0.25)
    weight = running_mean = None
    for update in range(4):
        nn.init.constant_(network[0].weight, float(update + 1))
        network(torch.randn(4, 3, 8, 8))
        decay = [0.0, 2 / 11, 3 / 12, 0.25][update]
        ema.update_parameters(network)
        old_weight = 0.0 if weight is None else weight
        old_mean = torch.zeros(4) if running_mean is None else running_mean
        weight = decay * old_weight + (1 - decay) * (update + 1)
        running_mean = decay * old_mean + (1 - decay) * network[1].running_mean
    assert ema.module[0].weight.unique().tolist() == pytest.approx([weight])
    torch.testing.assert_close(ema.module[1].running_mean, running_mean)
    assert ema.module[1].num_batches_tracked.item() == 4
    assert ema.n_averaged.item() == 4


def test_average_does_not_touch_the_model_or_ask_for_gradients():
    network = small_network()
    before = copy.deepcopy(network.state_dict())
    ema = build_ema(network, 0.99)
    ema.update_parameters(network)
    assert not ema.module.training
    assert network.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
        assert torch.equal(value, ema.module.state_dict()[key])


def test_no_average_for_a_decay_of_zero():
    assert build_ema(small_network(), 0.0) is None
