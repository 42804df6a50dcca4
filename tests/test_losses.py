"""Losses against hand-computed numbers and torch's own; what is unknown has exactly no influence."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rafce_ray.base.errors import UsageError
from rafce_ray.base.taxonomy import RAFCE_EMOTIONS, SEED18, make_taxonomy
from rafce_ray.config import LossConfig
from rafce_ray.data.loader import Batch
from rafce_ray.model.losses import (
    AU_LOSSES,
    LossSettings,
    MultiTaskLoss,
    Objective,
    asymmetric_loss,
    build_loss,
    class_weights,
    log_prior,
    pos_weights,
    vote_shares,
    votes_loss,
)
from rafce_ray.model.network import Logits

pytestmark = pytest.mark.numeric

RAFCE = make_taxonomy(tuple(RAFCE_EMOTIONS), SEED18)
NAN = math.nan


def make_batch(
    emotion: Tensor, action_units: Tensor, votes: Tensor | None = None, weights: Tensor | None = None
) -> Batch:
    """A global batch of one worker; images are features that a linear model reads."""
    size = len(emotion)
    votes = torch.full((size, 6), NAN) if votes is None else votes
    known = emotion >= 0
    generator = torch.Generator().manual_seed(size)
    return Batch(
        images=torch.randn(size, 8, generator=generator),
        emotion=emotion,
        action_units=action_units,
        votes=votes,
        emotion_norm=known.sum().float() if weights is None else weights[emotion[known]].sum(),
        au_norm=(~action_units.isnan()).sum().float(),
        votes_norm=(~votes.isnan().any(1)).sum().float(),
        rows=np.arange(size),
    )


def random_batch(size: int = 12, unknown: float = 0.3, weights: Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    emotion = torch.randint(0, 14, (size,), generator=generator)
    emotion[torch.rand(size, generator=generator) < unknown] = -1
    action_units = (torch.rand(size, 18, generator=generator) < 0.4).float()
    action_units[torch.rand(size, 18, generator=generator) < unknown] = NAN
    votes = torch.softmax(torch.randn(size, 6, generator=generator), 1)
    votes[::3] = NAN
    return make_batch(emotion, action_units, votes, weights)


def random_logits(size: int = 12) -> Logits:
    generator = torch.Generator().manual_seed(1)
    emotion = torch.randn(size, 14, generator=generator).requires_grad_()
    return Logits(emotion, torch.randn(size, 18, generator=generator).requires_grad_())


class LinearModel(nn.Module):
    """Two heads on given features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.emotion, self.action_units = nn.Linear(8, 14), nn.Linear(8, 18)

    def forward(self, images: Tensor) -> Logits:
        return Logits(self.emotion(images), self.action_units(images))


def test_hand_computed_losses():
    logits = Logits(torch.tensor([[0.0, math.log(3)], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [math.log(4), 0.0]]))
    batch = make_batch(torch.tensor([1, -1]), torch.tensor([[1.0, NAN], [0.0, NAN]]))
    losses = MultiTaskLoss(LossSettings())(logits, batch, 0.5)
    assert losses.emotion.item() == pytest.approx(-math.log(3 / 4))
    assert losses.action_units.item() == pytest.approx((math.log(2) + math.log(5)) / 2)
    assert losses.total.item() == pytest.approx(losses.emotion.item() + 0.5 * losses.action_units.item())
    weighted = MultiTaskLoss(LossSettings(pos_weights=np.array([3.0, 1.0])))(logits, batch, 0.5)
    assert weighted.action_units.item() == pytest.approx((3 * math.log(2) + math.log(5)) / 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_emotion_loss_is_torchs_on_one_worker(smoothing: float, weighted: bool):
    weights = torch.linspace(0.2, 2.0, 14) if weighted else None
    batch, logits = random_batch(weights=weights), random_logits()
    settings = LossSettings(label_smoothing=smoothing, class_weights=None if weights is None else weights.numpy())
    ours = MultiTaskLoss(settings)(logits, batch, 0.0).emotion
    reference = nn.CrossEntropyLoss(weight=weights, label_smoothing=smoothing, ignore_index=-1)
    torch.testing.assert_close(ours, reference(logits.emotion, batch.emotion).detach())


def test_logit_adjustment_adds_the_prior_to_training_logits():
    batch, logits = random_batch(), random_logits()
    counts = np.arange(1, 15)
    loss = build_loss(
        LossConfig(imbalance="logit_adjustment", logit_adjustment_tau=1.5, label_smoothing=0),
        RAFCE,
        class_counts=counts,
        class_weights=None,
        au_positives=np.zeros(18),
        au_negatives=np.zeros(18),
    )
    adjusted = logits.emotion + 1.5 * torch.tensor(np.log(counts / counts.sum()), dtype=torch.float32)
    torch.testing.assert_close(
        loss(logits, batch, 0.0).emotion, F.cross_entropy(adjusted, batch.emotion, ignore_index=-1).detach()
    )


def test_asymmetric_loss_hand_computed():
    logits = torch.tensor([[0.0, math.log(4), -5.0]])
    elements = asymmetric_loss(logits, torch.tensor([[1.0, 0.0, 0.0]]), None)[0]
    assert elements[0].item() == pytest.approx(math.log(2))
    # p = 0.8, q = 0.75: -0.75^4 log 0.25.
    assert elements[1].item() == pytest.approx(0.75**4 * math.log(4))
    # p = 0.0067 is below the margin.
    assert elements[2].item() == 0.0


def test_asymmetric_loss_without_focusing_and_margin_is_binary_cross_entropy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rafce_ray.model.losses.ASYMMETRIC_GAMMA_NEG", 0.0)
    monkeypatch.setattr("rafce_ray.model.losses.ASYMMETRIC_MARGIN", 0.0)
    logits, targets = torch.randn(5, 4), torch.randint(0, 2, (5, 4)).float()
    weights = torch.tensor([1.0, 2.0, 3.0, 0.5])
    torch.testing.assert_close(
        asymmetric_loss(logits, targets, weights),
        F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none"),
    )


@pytest.mark.parametrize("au_loss", sorted(AU_LOSSES))
def test_unknown_targets_have_exactly_no_gradient(au_loss: str):
    batch, logits = random_batch(), random_logits()
    settings = LossSettings(au_loss=au_loss, label_smoothing=0.1, votes_weight=0.0)
    MultiTaskLoss(settings)(logits, batch, 1.0).total.backward()
    unknown = batch.action_units.isnan()
    assert unknown.any()
    assert (logits.action_units.grad[unknown] == 0).all()
    assert (logits.emotion.grad[batch.emotion < 0] == 0).all()
    assert (logits.emotion.grad[batch.emotion >= 0] != 0).any(dim=1).all()
    if au_loss == "bce":
        assert (logits.action_units.grad[~unknown] != 0).all()


def test_masking_differs_from_calling_unknown_absent():
    batch, logits = random_batch(), random_logits()
    masked = MultiTaskLoss(LossSettings())(logits, batch, 1.0).action_units
    known = ~batch.action_units.isnan()
    reference = F.binary_cross_entropy_with_logits(logits.action_units[known], batch.action_units[known])
    torch.testing.assert_close(masked, reference.detach())


@pytest.mark.parametrize("task_weighting", ["fixed", "uncertainty"])
def test_two_ranks_equal_one_worker(task_weighting: str):
    weights = torch.linspace(0.2, 2.0, 14)
    settings = LossSettings(
        label_smoothing=0.1,
        class_weights=weights.numpy(),
        votes_weight=0.3,
        vote_shares=vote_shares(RAFCE),
        task_weighting=task_weighting,
    )
    whole = random_batch(weights=weights)
    # The first rank has 5 images, the second 7: what DDP does is the plain mean over ranks of gradients.
    ranks = [
        Batch(*(field[rows] for field in whole[:4]), *whole[4:7], whole.rows[rows])
        for rows in (slice(0, 5), slice(5, 12))
    ]
    one = Objective(LinearModel(), MultiTaskLoss(settings), num_workers=1)
    two = Objective(LinearModel(), MultiTaskLoss(settings), num_workers=2)
    if task_weighting == "uncertainty":
        for objective in (one, two):
            nn.init.constant_(objective.loss.log_variances, 0.7)

    alone, _ = one(whole, 0.8)
    alone.total.backward()
    shares = [two(part, 0.8)[0] for part in ranks]
    (torch.stack([share.total for share in shares]).mean()).backward()
    torch.testing.assert_close(sum(share.total for share in shares) / 2, alone.total)
    for name in ("emotion", "action_units", "votes"):
        torch.testing.assert_close(sum(getattr(share, name) for share in shares), getattr(alone, name))
    for (name, ours), theirs in zip(two.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("task_weighting", ["fixed", "uncertainty"])
@pytest.mark.parametrize("norm", [0.0, 20.0])
def test_nothing_known_still_steps(task_weighting: str, norm: float):
    """A whole batch (norm 0) or this rank's part of it (others know something) without any known target."""
    batch = make_batch(torch.full((4,), -1), torch.full((4, 18), NAN))
    norms = {name: torch.tensor(norm) for name in ("emotion_norm", "au_norm", "votes_norm")}
    settings = LossSettings(
        label_smoothing=0.1, votes_weight=1.0, vote_shares=vote_shares(RAFCE), task_weighting=task_weighting
    )
    objective = Objective(LinearModel(), MultiTaskLoss(settings))
    losses, _ = objective(batch._replace(**norms), 1.0)
    losses.total.backward()
    assert losses.total.item() == 0.0
    for name, parameter in objective.model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name
    if task_weighting == "uncertainty":
        # Where others know something, the penalty s / 2 counts; where nobody does, the task weights stay.
        assert objective.loss.log_variances.grad.tolist() == ([0.5, 0.5] if norm else [0.0, 0.0])


def test_uncertainty_weighting_hand_computed_and_learned():
    batch, logits = random_batch(), random_logits()
    loss = MultiTaskLoss(LossSettings(task_weighting="uncertainty"))
    with torch.no_grad():
        loss.log_variances.copy_(torch.tensor([0.5, -1.0]))
    losses = loss(logits, batch, 2.0)
    emotion, action_units = losses.emotion.item(), losses.action_units.item()
    expected = math.exp(-0.5) * emotion + 0.25 + 2.0 * (math.exp(1.0) * action_units - 0.5)
    assert losses.total.item() == pytest.approx(expected, rel=1e-6)
    # With losses held still the minimum is at exp(s) = 2 L.
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        loss(Logits(logits.emotion.detach(), logits.action_units.detach()), batch, 1.0).total.backward()
        optimizer.step()
    assert loss.log_variances.exp().tolist() == pytest.approx([2 * emotion, 2 * action_units], rel=1e-3)
    assert "log_variances" in loss.state_dict()
    assert list(loss.state_dict()) == ["log_variances"]


def test_zero_au_weight_touches_the_au_head_with_zero_gradient():
    objective = Objective(LinearModel(), MultiTaskLoss(LossSettings()))
    objective(random_batch(), 0.0)[0].total.backward()
    assert (objective.model.action_units.weight.grad == 0).all()
    assert (objective.model.emotion.weight.grad != 0).any()


def test_votes_loss_hand_computed():
    # One class, half happy and half surprised, whatever the logit.
    shares = torch.tensor(vote_shares(make_taxonomy(("happily surprised",), ())), dtype=torch.float32)
    votes = torch.tensor([[0.25, 0, 0, 0.75, 0, 0], [NAN] * 6])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert votes_loss(torch.zeros(2, 1), votes, shares).item() == pytest.approx(expected, rel=1e-5)
    # Votes that are exactly what is predicted cost nothing.
    shares = torch.tensor(vote_shares(RAFCE), dtype=torch.float32)
    logits = torch.randn(3, 14)
    assert votes_loss(logits, torch.softmax(logits, 1) @ shares, shares).item() == pytest.approx(0, abs=1e-5)


def test_votes_are_used_by_their_weight():
    batch, logits = random_batch(), random_logits()
    settings = LossSettings(votes_weight=0.7, vote_shares=vote_shares(RAFCE))
    losses = MultiTaskLoss(settings)(logits, batch, 1.0)
    plain = MultiTaskLoss(LossSettings())(logits, batch, 1.0)
    known = ~batch.votes.isnan().any(1)
    shares = torch.softmax(logits.emotion[known], 1) @ torch.tensor(vote_shares(RAFCE), dtype=torch.float32)
    reference = F.kl_div(shares.log(), batch.votes[known], reduction="batchmean")
    torch.testing.assert_close(losses.votes, reference.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.total, plain.total + 0.7 * losses.votes)


def test_vote_shares_follow_the_order_of_votes():
    shares = vote_shares(RAFCE)
    assert shares.sum(axis=1).tolist() == [1.0] * 14
    # surprised, fearful, disgusted, happy, sad, angry
    assert shares[0].tolist() == [0.5, 0, 0, 0.5, 0, 0]
    assert shares[3].tolist() == [0, 0, 0, 0, 0.5, 0.5]
    with pytest.raises(UsageError, match=r"votes_weight=0"):
        vote_shares(make_taxonomy(("happily surprised", "neutral"), ()))


def test_losses_are_float32_under_autocast():
    batch = random_batch()
    weights = torch.linspace(0.2, 2.0, 14)
    settings = LossSettings(
        label_smoothing=0.1, class_weights=weights.numpy(), votes_weight=0.5, vote_shares=vote_shares(RAFCE)
    )
    loss, logits = MultiTaskLoss(settings), random_logits()
    rounded = Logits(logits.emotion.bfloat16(), logits.action_units.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = loss(rounded, batch, 1.0)
    outside = loss(Logits(rounded.emotion.float(), rounded.action_units.float()), batch, 1.0)
    for ours, theirs in zip(under, outside, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_a_model_with_one_task_has_the_other_loss_at_zero():
    batch, logits = random_batch(), random_logits()
    loss = MultiTaskLoss(LossSettings())
    emotion_only = loss(Logits(logits.emotion, None), batch, 1.0)
    assert emotion_only.action_units.item() == 0.0
    assert emotion_only.total.item() == emotion_only.emotion.item()
    aus_only = loss(Logits(None, logits.action_units), batch, 1.0)
    assert aus_only.emotion.item() == 0.0
    assert aus_only.total.item() == aus_only.action_units.item()


def test_class_weights():
    counts = np.array([100, 10, 1, 0])
    beta = 0.9
    effective = (1 - beta ** counts[:3].astype(float)) / (1 - beta)
    expected = 1 / effective
    expected /= expected.mean()
    np.testing.assert_allclose(class_weights(counts, beta), [*expected, 1.0])
    np.testing.assert_allclose(class_weights(counts, 0.0), 1.0)
    assert class_weights(counts, 0.9999)[1] / class_weights(counts, 0.9999)[0] == pytest.approx(10, rel=0.01)
    assert class_weights(np.zeros(3), 0.99).tolist() == [1.0, 1.0, 1.0]


def test_pos_weights():
    weights = pos_weights(np.array([10, 50, 1, 0, 5, NAN]), np.array([40, 25, 99, 100, 0, NAN]), cap=10)
    assert weights.tolist() == [4.0, 0.5, 10.0, 1.0, 1.0, 1.0]


def test_log_prior():
    np.testing.assert_allclose(np.exp(log_prior(np.array([30, 10]))), [0.75, 0.25])
    prior = log_prior(np.array([30, 1, 0]))
    assert np.isfinite(prior).all()
    assert prior[2] < prior[1] < prior[0]
    np.testing.assert_allclose(np.exp(prior).sum(), 1)
    with pytest.raises(ValueError, match="at least one labelled image"):
        log_prior(np.zeros(3))


def test_build_loss_reads_its_configuration():
    statistics = {
        "class_counts": np.arange(14),
        "class_weights": None,
        "au_positives": np.full(18, 10),
        "au_negatives": np.full(18, 500),
    }
    plain = build_loss(LossConfig(), RAFCE, **statistics)
    assert plain.class_weights is plain.logit_offset is plain.pos_weights is plain.vote_shares is None
    assert plain.log_variances is None
    assert plain.settings.label_smoothing == 0.1
    full = build_loss(
        LossConfig(pos_weight_cap=10, task_weighting="uncertainty", votes_weight=0.5, imbalance="logit_adjustment"),
        RAFCE,
        **statistics,
    )
    assert full.pos_weights.tolist() == [10.0] * 18
    assert torch.isfinite(full.logit_offset).all()
    assert full.vote_shares.shape == (14, 6)
    assert full.log_variances.tolist() == [0.0, 0.0]
    with pytest.raises(UsageError, match="one alone is trained"):
        build_loss(LossConfig(task_weighting="uncertainty"), make_taxonomy(tuple(RAFCE_EMOTIONS), ()), **statistics)
