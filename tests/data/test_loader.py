import numpy as np
import pytest
import torch

from rafce_ray.base.errors import UsageError
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.data.loader import (
    Dataset,
    ImageSource,
    TrainLoader,
    balancing_weights,
    check_shares,
    epoch_order,
    step_seed,
    tally,
)
from rafce_ray.data.records import Targets
from rafce_ray.model.losses import LossSettings, MultiTaskLoss, Objective
from rafce_ray.model.network import Logits


class NumberedImages:
    """Image i is filled with the value i, so that a batch shows what is in it."""

    stored_px = 4

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def gather(self, indices: np.ndarray) -> np.ndarray:
        return np.broadcast_to(np.asarray(indices, np.uint8)[:, None, None, None], (len(indices), 4, 4, 3)).copy()


def dataset(emotion: list[int]) -> Dataset:
    count = len(emotion)
    action_units = np.zeros((count, 2), np.float32)
    action_units[::3, 0] = np.nan
    votes = np.full((count, 6), np.nan, np.float32)
    votes[0] = 1 / 6
    targets = Targets(
        emotion=np.array(emotion, np.int64),
        action_units=action_units,
        null_row=np.zeros(count, bool),
        votes=votes,
        split=np.zeros(count, np.int8),
    )
    return Dataset(
        [str(i) for i in range(count)], NumberedImages(count), targets, make_taxonomy(("a", "b"), (1, 2)), "f"
    )


def loader(data: Dataset, **changes) -> TrainLoader:
    values = {
        "batch_size": 8,
        "seed": 3,
        "oversample": False,
        "class_weights": None,
        "rank": 0,
        "num_workers": 1,
        "device": torch.device("cpu"),
    }
    return TrainLoader(data, np.arange(len(data.names)), **{**values, **changes})


def seen(batches) -> list[int]:
    return [int(value) for batch in batches for value in batch.images[:, 0, 0, 0]]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("count", [13, 50, 64])
def test_an_epoch_uses_every_image_exactly_once_whatever_the_number_of_workers(count, num_workers):
    data = dataset([0, 1] * (count // 2) + [0] * (count % 2))
    workers = [loader(data, rank=rank, num_workers=num_workers) for rank in range(num_workers)]
    parts = [list(one.batches(epoch=0)) for one in workers]
    assert sorted(seen([batch for part in parts for batch in part])) == list(range(count))
    assert {len(part) for part in parts} == {workers[0].steps_per_epoch}
    sizes = [sum(len(part[step].images) for part in parts) for step in range(workers[0].steps_per_epoch)]
    assert max(sizes) - min(sizes) <= 1


def test_the_order_depends_on_seed_and_epoch_alone():
    data = dataset([0, 1] * 20)
    first = seen(loader(data).batches(epoch=0))
    assert seen(loader(data).batches(epoch=0)) == first
    assert seen(loader(data).batches(epoch=1)) != first
    assert seen(loader(data, seed=4).batches(epoch=0)) != first
    interleaved = zip(*(loader(data, rank=rank, num_workers=2).batches(epoch=0) for rank in (0, 1)), strict=True)
    whole = list(loader(data).batches(epoch=0))
    assert [sorted(seen(pair)) for pair in interleaved] == [sorted(seen([batch])) for batch in whole]


def test_starting_in_mid_epoch_gives_the_same_remaining_batches():
    data = dataset([0, 1] * 20)
    whole = list(loader(data).batches(epoch=2))
    rest = list(loader(data).batches(epoch=2, first_step=3))
    assert seen(rest) == seen(whole[3:])


class LogitTable(torch.nn.Module):
    """Logits of its own for every numbered image."""

    def __init__(self, count: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.emotion = torch.nn.Parameter(torch.randn(count, 2, generator=generator, dtype=torch.float64))
        self.action_units = torch.nn.Parameter(torch.randn(count, 2, generator=generator, dtype=torch.float64))

    def forward(self, images: torch.Tensor) -> Logits:
        numbers = images[:, 0, 0, 0].long()
        return Logits(self.emotion[numbers], self.action_units[numbers])


@pytest.mark.parametrize("seed", range(12))
def test_workers_that_come_and_go_within_an_epoch_use_each_image_once_and_descend_the_same_loss(seed):
    """1, 3, 2 and 4 workers, one after the other, each from the step that the ones before have come to."""
    generator = np.random.default_rng(seed)
    count, epoch = int(generator.integers(60, 200)), int(generator.integers(5))
    data = dataset(generator.integers(-1, 2, count).tolist())
    alone = list(loader(data, batch_size=16).batches(epoch))
    sizes = [1, 3, 2, 4]
    changes = [0, *sorted(generator.choice(np.arange(1, len(alone)), len(sizes) - 1, replace=False)), len(alone)]
    used, tallied = [], torch.zeros(2, dtype=torch.int64)
    for num_workers, first, last in zip(sizes, changes[:-1], changes[1:], strict=True):
        workers = [loader(data, batch_size=16, rank=rank, num_workers=num_workers) for rank in range(num_workers)]
        shares = zip(*(one.batches(epoch, first) for one in workers), strict=True)
        for step, parts in zip(range(first, last), shares, strict=False):
            used += seen(parts)
            tallied += sum(tally(part.rows) for part in parts)
            assert sorted(seen(parts)) == sorted(seen([alone[step]]))
            assert min(len(part.images) for part in parts) >= 2
            one, many = (
                Objective(LogitTable(count), MultiTaskLoss(LossSettings(label_smoothing=0.1)), number)
                for number in (1, num_workers)
            )
            whole = one(alone[step], 0.8)[0]
            whole.total.backward()
            losses = [many(part, 0.8)[0] for part in parts]
            # What DistributedDataParallel does: the plain mean over workers.
            torch.stack([loss.total for loss in losses]).mean().backward()
            torch.testing.assert_close(sum(loss.total for loss in losses) / num_workers, whole.total)
            torch.testing.assert_close(sum(loss.emotion for loss in losses), whole.emotion)
            torch.testing.assert_close(sum(loss.action_units for loss in losses), whole.action_units)
            for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad)
    assert sorted(used) == list(range(count))
    assert torch.equal(tallied, tally(loader(data, batch_size=16).order(epoch)))


def test_a_tally_knows_which_rows_and_how_often_but_not_in_what_order():
    rows = np.arange(1000)
    whole = tally(rows)
    assert whole[0] == 1000
    assert torch.equal(tally(rows[::-1].copy()), whole)
    assert torch.equal(sum(tally(part) for part in np.array_split(rows, 7)), whole)
    twice = rows.copy()
    twice[3] = 4
    swapped = rows.copy()
    swapped[[3, 4]] = 2, 5  # as many, and the same sum
    for other in (rows[1:], twice, swapped, np.append(rows, 0)):
        assert not torch.equal(tally(other), whole)


def test_labels_belong_to_their_images():
    data = dataset([i % 2 for i in range(40)])
    for batch in loader(data).batches(epoch=0):
        images = batch.images[:, 0, 0, 0].long()
        assert torch.equal(batch.emotion, images % 2)
        assert torch.equal(batch.action_units[:, 0].isnan(), images % 3 == 0)


def test_the_norms_count_what_is_known_in_the_batch_of_all_workers():
    data = dataset([0, -1, 1, 1] * 8)
    weights = np.array([0.5, 2.0])
    for step, parts in enumerate(
        zip(*(loader(data, rank=r, num_workers=2, class_weights=weights).batches(epoch=0) for r in (0, 1)), strict=True)
    ):
        emotion = torch.cat([part.emotion for part in parts])
        action_units = torch.cat([part.action_units for part in parts])
        expected = 0.5 * (emotion == 0).sum() + 2.0 * (emotion == 1).sum()
        for part in parts:
            assert part.emotion_norm.item() == pytest.approx(expected.item())
            assert part.au_norm.item() == (~action_units.isnan()).sum().item(), step
            assert part.votes_norm.item() == (~torch.cat([p.votes for p in parts]).isnan()).all(1).sum().item()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_oversampling_makes_classes_equally_frequent_on_any_number_of_workers(num_workers):
    data = dataset([0] * 180 + [1] * 20)
    drawn = [
        index
        for rank in range(num_workers)
        for epoch in range(10)
        for index in seen(loader(data, oversample=True, rank=rank, num_workers=num_workers).batches(epoch))
    ]
    assert len(drawn) == 2000
    share = np.mean([index >= 180 for index in drawn])
    # 2,000 draws at 0.5: four standard deviations are 0.045.
    assert abs(share - 0.5) < 0.045


def test_balancing_weights_by_hand():
    weights = balancing_weights(np.array([0, 0, 0, 1, -1]))
    np.testing.assert_allclose(weights, [4 / 6, 4 / 6, 4 / 6, 2.0, 1.0])
    assert weights[:3].sum() == pytest.approx(weights[3])


def test_an_order_is_a_permutation_of_its_indices():
    indices = np.array([5, 9, 11, 40])
    assert sorted(epoch_order(indices, 0, 0)) == [5, 9, 11, 40]


def test_step_seeds_differ_in_every_part():
    seeds = {step_seed(a, b, c, d) for a in range(3) for b in range(3) for c in range(3) for d in range(3)}
    assert len(seeds) == 81
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_too_few_images_for_the_workers_is_said():
    with pytest.raises(UsageError, match=r"Lower run\.num_workers"):
        loader(dataset([0, 1, 0]), num_workers=2)
    with pytest.raises(UsageError, match=r"optim\.batch_size"):
        loader(dataset([0, 1] * 20), num_workers=2, batch_size=3)


def test_the_smallest_batch_is_shared_out_not_the_one_that_was_asked_for():
    # 41 images in batches of 16 are three of 14, 14 and 13.
    check_shares(41, 16, 6)
    with pytest.raises(UsageError, match="fewer than 2 a step for each of 7 workers"):
        check_shares(41, 16, 7)
    check_shares(45, 16, 7)


def test_image_source_follows_the_order_it_is_asked_for():
    data = dataset([0] * 10)
    source = ImageSource(data, np.arange(10), torch.device("cpu"))
    batches = list(source.gather_all([np.array([7, 2]), np.array([9])]))
    assert [batch[:, 0, 0, 0].tolist() for batch in batches] == [[7, 2], [9]]
