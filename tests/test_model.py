"""Shapes of every backbone, torchvision's own outputs as the reference, where gradients may go, and that it learns."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torchvision.models import get_model

from rafce_ray.base.errors import UsageError
from rafce_ray.base.taxonomy import RAFCE_EMOTIONS, SEED18, Taxonomy, make_taxonomy
from rafce_ray.config import BACKBONES, ModelConfig
from rafce_ray.data.loader import Batch
from rafce_ray.model.backbones import build_trunk, efficientnet_lite0
from rafce_ray.model.losses import LossSettings, MultiTaskLoss, Objective
from rafce_ray.model.network import (
    Architecture,
    MultiTaskModel,
    build_architecture,
    build_model,
    freeze_stages,
    initialise_au_bias,
    load_backbone_weights,
    sinusoids,
)
from rafce_ray.model.optim import build_optimizer

pytestmark = pytest.mark.numeric

RAFCE = make_taxonomy(tuple(RAFCE_EMOTIONS), SEED18)
NAN = math.nan


def architecture(backbone: str = "mobilenet_v3_small", taxonomy: Taxonomy = RAFCE, **settings: object) -> Architecture:
    stop = bool(settings.pop("au_stop_gradient", False))
    config = ModelConfig.model_validate({"backbone": backbone, "image_px": 64, "dropout": 0.0, **settings})
    return build_architecture(config, taxonomy, au_stop_gradient=stop)


def small_model(**settings: object) -> MultiTaskModel:
    torch.manual_seed(0)
    return build_model(architecture(**settings))


def faces(size: int = 4) -> torch.Tensor:
    return torch.randn(size, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def batch_of(size: int = 4, image_px: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(2)
    action_units = (torch.rand(size, 18, generator=generator) < 0.3).float()
    return Batch(
        images=torch.randn(size, 3, image_px, image_px, generator=generator),
        emotion=torch.randint(0, 14, (size,), generator=generator),
        action_units=action_units,
        votes=torch.full((size, 6), NAN),
        emotion_norm=torch.tensor(float(size)),
        au_norm=torch.tensor(float(action_units.numel())),
        votes_norm=torch.tensor(0.0),
        rows=np.arange(size),
    )


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("image_px", [64, 96])
def test_every_backbone_gives_the_right_shapes(backbone: str, image_px: int):
    seen = []
    with torch.device("meta"), torch.inference_mode():
        model = build_model(
            architecture(backbone, image_px=image_px, au_attention=image_px == 64, compositional_head=True)
        ).eval()
        model.trunk.register_forward_hook(lambda trunk, inputs, outputs: seen.append(outputs))
        logits = model(torch.zeros(2, 3, image_px, image_px))
    [features] = seen
    stride = 16 if backbone == "vit_b_16" else 32
    assert features.map.shape == (2, model.trunk.num_features, image_px // stride, image_px // stride)
    assert features.pooled.shape == (2, model.trunk.num_features)
    assert logits.emotion.shape == (2, 14)
    assert logits.action_units.shape == (2, 18)


HEAVY = {"resnet34", "resnet50", "resnet101", "convnext_tiny", "vit_b_16"}


@pytest.mark.parametrize(
    "backbone", [pytest.param(name, marks=[pytest.mark.slow] if name in HEAVY else []) for name in BACKBONES]
)
def test_trunk_is_torchvisions(backbone: str, tmp_path):
    """torchvision's classifier on our pooled features gives torchvision's outputs, after a trip through a file."""
    torch.manual_seed(0)
    size = {"image_size": 64} if backbone == "vit_b_16" else {}
    lite0 = backbone == "efficientnet_lite0"
    network = efficientnet_lite0() if lite0 else get_model(backbone, weights=None, **size)
    network.eval()
    if backbone == "vit_b_16":
        nn.init.normal_(network.heads.head.weight)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    model = build_model(architecture(backbone)).eval()
    report = load_backbone_weights(model, str(tmp_path / "weights.pth"))
    assert (report.coverage, report.missing, report.unexpected) == (1.0, (), ())
    assert report.num_head_tensors > 0
    with torch.inference_mode():
        pooled = model.trunk(faces()).pooled
        if backbone.startswith("resnet"):
            outputs = network.fc(pooled)
        elif backbone == "vit_b_16":
            outputs = network.heads(pooled)
        elif backbone == "convnext_tiny":
            # Its classifier begins with the norm that is part of our trunk.
            outputs = network.classifier[2](pooled)
        else:
            outputs = network.classifier(pooled)
        torch.testing.assert_close(outputs, network(faces()), rtol=1e-4, atol=1e-5)


def test_a_task_without_outputs_has_no_head():
    emotions_only = small_model(taxonomy=make_taxonomy(("smiling", "neutral"), ()))
    logits = emotions_only(faces())
    assert logits.emotion.shape == (4, 2)
    assert logits.action_units is None
    assert not any(name.startswith("au_") for name, _ in emotions_only.named_parameters())
    aus_only = small_model(taxonomy=make_taxonomy((), (12,)), au_attention=True)
    logits = aus_only(faces())
    assert logits.emotion is None
    assert logits.action_units.shape == (4, 1)
    # Nothing that no loss would ever reach: DDP waits for every parameter.
    logits.action_units.sum().backward()
    assert all(parameter.grad is not None for parameter in aus_only.parameters())


@pytest.mark.parametrize("au_attention", [False, True])
@pytest.mark.parametrize("au_stop_gradient", [False, True])
@pytest.mark.parametrize("compositional_head", [False, True])
def test_every_parameter_gets_a_gradient(au_attention: bool, au_stop_gradient: bool, compositional_head: bool):
    model = small_model(
        au_attention=au_attention, au_stop_gradient=au_stop_gradient, compositional_head=compositional_head
    )
    Objective(model, MultiTaskLoss(LossSettings()))(batch_of(), 1.0)[0].total.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("au_attention", [False, True])
def test_stopped_au_gradient_never_reaches_the_trunk_nor_the_emotion_head(au_attention: bool):
    model = small_model(au_attention=au_attention, au_stop_gradient=True)
    model(faces()).action_units.square().sum().backward()
    touched = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched == ({"au_attention", "au_head"} if au_attention else {"au_head"})
    model.zero_grad()
    model(faces()).emotion.square().sum().backward()
    touched = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched == ({"trunk", "emotion_head", "token_summary"} if au_attention else {"trunk", "emotion_head"})


def test_without_the_stop_both_tasks_train_the_trunk():
    model = small_model(au_attention=True)
    for task in ("emotion", "action_units"):
        model.zero_grad()
        getattr(model(faces()), task).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.trunk.parameters())


def test_an_au_logit_comes_from_its_own_token():
    model = small_model(au_attention=True).eval()
    before = model(faces()).action_units
    with torch.no_grad():
        model.au_attention.queries[3] += 1.0
    after = model(faces()).action_units
    changed = (before - after).abs().amax(dim=0) > 0
    assert changed.tolist() == [i == 3 for i in range(18)]


def test_the_emotion_head_reads_au_tokens():
    model = small_model(au_attention=True).eval()
    before = model(faces()).emotion
    with torch.no_grad():
        model.au_attention.queries[3] += 1.0
    assert (model(faces()).emotion - before).abs().max() > 0


def test_attention_sees_where_a_feature_lies():
    model = small_model(au_attention=True).eval()
    feature_map = torch.randn(1, model.trunk.num_features, 3, 3)
    tokens, mirrored = model.au_attention(feature_map), model.au_attention(feature_map.flip(3))
    assert (tokens - mirrored).abs().max() > 1e-3
    grid = sinusoids(3, 4, 16, torch.device("cpu"))
    assert grid.shape == (12, 16)
    assert len(torch.unique(grid, dim=0)) == 12


def test_compositional_logits_by_hand():
    model = small_model(compositional_head=True)
    head = model.emotion_head
    features = torch.randn(2, model.trunk.num_features)
    scores, flat = head.basic(features), head.flat(features)
    basic = RAFCE.basic_emotions
    for i, (first, second) in enumerate(RAFCE.components):
        expected = flat[:, i] + scores[:, basic.index(first)] + scores[:, basic.index(second)]
        torch.testing.assert_close(head(features)[:, i], expected)


def test_a_class_without_components_keeps_its_flat_logit():
    taxonomy = make_taxonomy(("happily sad", "neutral"), ())
    head = small_model(taxonomy=taxonomy, compositional_head=True).emotion_head
    features = torch.randn(2, head.flat.in_features)
    assert torch.equal(head(features)[:, 1], head.flat(features)[:, 1])
    assert not torch.equal(head(features)[:, 0], head.flat(features)[:, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"taxonomy": make_taxonomy(("smiling", "neutral"), (12,)), "compositional_head": True}, "compositional_head"),
        ({"taxonomy": make_taxonomy(("smiling", "neutral"), ()), "au_attention": True}, "needs action units"),
        ({"taxonomy": make_taxonomy((), (12,)), "au_stop_gradient": True}, "au_stop_gradient"),
        ({"taxonomy": make_taxonomy((), ())}, "at least one"),
        ({"backbone": "vit_b_16", "image_px": 100}, "multiple of 16"),
    ],
)
def test_what_does_not_fit_together_is_refused(settings: dict[str, object], message: str):
    with pytest.raises(UsageError, match=message):
        architecture(**settings)  # type: ignore[arg-type]


def test_architecture_survives_json_and_builds_the_same_network():
    before = architecture(au_attention=True, compositional_head=True)
    after = Architecture.from_plain(json.loads(json.dumps(before.to_plain())))
    assert after == before
    model = build_model(after)
    model.load_state_dict(small_model(au_attention=True, compositional_head=True).state_dict())


def test_the_seed_decides_the_weights():
    one, two = small_model(au_attention=True), small_model(au_attention=True)
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key])


def test_a_frozen_trunk_stays_as_it_is():
    objective = Objective(small_model(), MultiTaskLoss(LossSettings()))
    model = objective.model
    freeze_stages(model, None)
    before = {key: value.clone() for key, value in model.trunk.state_dict().items()}
    optimizer = build_optimizer(objective, "adamw", lr=1e-2, weight_decay=1e-2)
    objective.train()
    assert model.training
    assert not any(module.training for module in model.trunk.modules())
    for _ in range(2):
        objective(batch_of(), 1.0)[0].total.backward()
        optimizer.step()
    for key, value in model.trunk.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert model.emotion_head.flat.weight.grad is not None


@pytest.mark.parametrize(("backbone", "num_stages"), [("mobilenet_v2", 7), ("resnet18", 3), ("convnext_tiny", 4)])
def test_a_cut_trunk_gives_what_the_whole_one_has_after_that_stage(backbone, num_stages):
    whole = build_trunk(backbone, 64).eval()
    cut = build_trunk(backbone, 64, num_stages).eval()
    assert len(cut.stages) == num_stages
    missing = cut.body.load_state_dict(whole.body.state_dict(), strict=False).missing_keys
    seen = []
    last = whole.stages[num_stages - 1]
    last.register_forward_hook(lambda module, given, output: seen.append(output))
    with torch.inference_mode():
        whole(faces())
        feature_map, pooled = cut(faces())
    assert not missing
    torch.testing.assert_close(feature_map, seen[0])
    torch.testing.assert_close(pooled, seen[0].mean((2, 3)))
    assert feature_map.shape[1] == cut.num_features


@pytest.mark.parametrize("settings", [{"num_stages": 6}, {"num_stages": 3, "frozen_stages": 4}])
def test_stages_that_do_not_exist(settings):
    with pytest.raises(UsageError, match=r"the (backbone|trunk) has [35] stages. Give [01] to [35]"):
        freeze_stages(small_model(backbone="resnet18", **settings), settings.get("frozen_stages"))


def test_a_transformer_is_not_cut():
    with pytest.raises(UsageError, match="vit_b_16 can only be used as a whole"):
        build_trunk("vit_b_16", 64, 3)


def test_the_heads_read_the_standardised_means_of_a_grid():
    model = small_model(backbone="resnet18", pool_grid=2)
    read = []
    model.dropout.register_forward_hook(lambda module, given, output: read.append(output))
    with torch.no_grad():
        feature_map, _ = model.trunk(faces(8))
        model(faces(8))
    assert feature_map.shape[2:] == (2, 2), "64 px over a stride of 32: each cell is one pixel of the map"
    cells = feature_map.flatten(1)
    expected = (cells - cells.mean(0)) / (cells.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(read[0], expected, atol=1e-4, rtol=1e-4)


def test_logits_are_those_of_a_face_and_its_mirror_image_outside_of_training():
    model = small_model(mirror_average=True).eval()
    plain = small_model().eval()
    with torch.inference_mode():
        found, mirrored = model(faces()), model(faces().flip(3))
        one, other = plain(faces()), plain(faces().flip(3))
    for task in ("emotion", "action_units"):
        torch.testing.assert_close(getattr(found, task), (getattr(one, task) + getattr(other, task)) / 2)
        torch.testing.assert_close(getattr(found, task), getattr(mirrored, task))
    model.train()
    assert not torch.allclose(model(faces()).emotion, model(faces().flip(3)).emotion)


def test_au_bias_is_the_log_odds_of_the_prevalence():
    model = small_model()
    prevalence = np.full(18, 0.25)
    prevalence[[0, 1, 2]] = [NAN, 0.0, 1.0]
    initialise_au_bias(model, prevalence)
    bias = model.au_head.bias.detach()
    assert bias[3:].tolist() == pytest.approx([-math.log(3)] * 15)
    assert bias[:3].tolist() == pytest.approx([0.0, -math.log(999), math.log(999)], rel=1e-5)
    with torch.inference_mode():
        first = torch.sigmoid(model.eval()(faces()).action_units)
    assert (first[:, 3:] - 0.25).abs().max() < 0.1
    with pytest.raises(ValueError, match="expected 18 shares"):
        initialise_au_bias(model, np.full(3, 0.5))
    with pytest.raises(ValueError, match="expected 18 shares"):
        initialise_au_bias(model, np.full(18, 1.5))


def test_a_prediction_does_not_depend_on_its_batch_mates_or_the_memory_format():
    model = small_model(au_attention=True, compositional_head=True).eval()
    with torch.inference_mode():
        together = model(faces())
        alone = model(faces()[2:3])
        channels_last = model.to(memory_format=torch.channels_last)(
            faces().contiguous(memory_format=torch.channels_last)
        )
    for whole, one, other in zip(together, alone, channels_last, strict=True):
        torch.testing.assert_close(whole[2:3], one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(whole, other, rtol=1e-4, atol=1e-5)


def test_bf16_autocast_gives_nearly_the_same():
    model = small_model(au_attention=True, compositional_head=True).eval()
    with torch.inference_mode():
        exact = model(faces())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(faces())
    for one, two in zip(exact, rounded, strict=True):
        assert (one - two).abs().max() < 0.05 * one.abs().max()


@pytest.mark.slow
def test_no_graph_breaks_under_compile():
    model = small_model(au_attention=True, compositional_head=True)
    explained = torch._dynamo.explain(model)(faces(2))
    assert explained.graph_break_count == 0, explained.break_reasons


@pytest.mark.parametrize(
    ("backbone", "settings"),
    [
        pytest.param("resnet18", {}, marks=pytest.mark.slow),
        ("mobilenet_v3_small", {"au_attention": True, "compositional_head": True}),
        pytest.param("efficientnet_b0", {}, marks=pytest.mark.slow),
        pytest.param("resnet50", {"au_attention": True}, marks=pytest.mark.slow),
        pytest.param("convnext_tiny", {}, marks=pytest.mark.slow),
        pytest.param("vit_b_16", {}, marks=pytest.mark.slow),
    ],
)
def test_a_fixed_batch_overfits(backbone: str, settings: dict[str, object]):
    torch.manual_seed(0)
    objective = Objective(build_model(architecture(backbone, image_px=32, **settings)), MultiTaskLoss(LossSettings()))
    batch = batch_of(8, image_px=32)
    optimizer = build_optimizer(objective, "adamw", lr=1e-3, weight_decay=0.0)
    first = objective(batch, 1.0)[0]
    for _ in range(30):
        losses, logits = objective(batch, 1.0)
        optimizer.zero_grad()
        losses.total.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
    assert (logits.emotion.argmax(1) == batch.emotion).all()
    assert losses.emotion < first.emotion / 10
    assert losses.action_units < first.action_units / 3


TIMM_NETWORKS = ("timm/mobilenetv3_small_050", "timm/test_vit", "timm/swin_tiny_patch4_window7_224", "timm/test_resnet")


@pytest.mark.parametrize("backbone", [*BACKBONES, *TIMM_NETWORKS])
def test_each_parameter_and_layer_is_in_one_stage(backbone: str):
    with torch.device("meta"):
        trunk = build_trunk(backbone, 64)
    parameters = [id(one) for stage in trunk.stages for one in stage.parameters()]
    assert len(parameters) == len(set(parameters))
    assert set(parameters) == {id(one) for one in trunk.parameters()}
    layers = {id(layer) for stage in trunk.stages for layer in stage.modules()}
    assert all(id(layer) in layers for layer in trunk.modules() if not any(layer.children()))
    assert id(next(trunk.parameters())) in parameters[: len(list(trunk.stages[0].parameters()))]


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0", "mobilenet_v2", TIMM_NETWORKS[0]])
def test_frozen_stages_stay_as_they_are_and_the_others_learn(backbone: str):
    torch.manual_seed(0)
    trunk = build_trunk(backbone, 64)
    trunk.freeze(2)
    before = {key: value.clone() for key, value in trunk.state_dict().items()}
    objective = nn.Sequential(trunk)
    optimizer = build_optimizer(objective, "adamw", lr=1e-2, weight_decay=1e-2)
    objective.train()
    features = trunk(faces())
    (features.map.square().mean() + features.pooled.square().mean()).backward()
    optimizer.step()
    frozen = {id(value) for stage in trunk.stages[:2] for value in stage.state_dict(keep_vars=True).values()}
    changed = {key: not torch.equal(value, before[key]) for key, value in trunk.state_dict().items()}
    kept = {key for key, value in trunk.state_dict(keep_vars=True).items() if id(value) in frozen}
    assert any("running_mean" in key for key in kept)
    assert not any(changed[key] for key in kept)
    assert all(changed[key] for key in changed if key not in kept and key.endswith("running_mean"))
    assert changed[list(changed)[-1]] or changed[list(changed)[-2]]
    with pytest.raises(ValueError, match="found 99 stages to freeze"):
        trunk.freeze(99)


@pytest.mark.parametrize("backbone", TIMM_NETWORKS)
def test_trunk_is_timms(backbone: str):
    """timm's classifier on our pooled features gives timm's outputs; the map has the image's directions."""
    torch.manual_seed(0)
    model = build_model(architecture(backbone, au_attention=True)).eval()
    network = timm.create_model(
        backbone.removeprefix("timm/"), **({"img_size": 64} if "vit" in backbone or "swin" in backbone else {})
    ).eval()
    assert not network.load_state_dict(model.trunk.body.state_dict(), strict=False).unexpected_keys
    with torch.inference_mode():
        features = model.trunk(faces())
        head = network.get_classifier()
        classifier = getattr(head, "fc", head)
        torch.testing.assert_close(classifier(features.pooled), network(faces()), rtol=1e-4, atol=1e-5)
        assert features.map.shape[1:] == (model.trunk.num_map_features, *features.map.shape[2:])
        changed = faces()
        changed[:, :, :16, 48:] += 10
        difference = (model.trunk(changed).map - features.map).abs().sum(dim=(0, 1))
    if difference.numel() > 4:
        assert divmod(int(difference.argmax()), difference.shape[1]) == (0, difference.shape[1] - 1)
    assert model(faces()).action_units.shape == (4, 18)


def test_unknown_networks_of_timms_are_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"timm/resnot18: timm .* has no such network; did you mean 'timm/resnet18'"):
        build_trunk("timm/resnot18", 64)
    with pytest.raises(UsageError, match=r"image_px=40: timm cannot build .*Set model\.image_px=224"):
        build_trunk("timm/levit_128s", 40)


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_b0", "mobilenet_v3_small"])
def test_batch_statistics_keep_up_with_the_weights_on_small_data(backbone):
    """torchvision's MobileNetV3 has 0.01: after a hundred steps its statistics would still be a third of the initial
    ones.
    """
    norms = [layer for layer in build_trunk(backbone, 64).modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) > 15
    assert {layer.momentum for layer in norms} == {0.1}
