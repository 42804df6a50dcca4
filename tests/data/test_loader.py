import numpy as np
import pytest
import torch

from rafce_ray.data.dataset import Dataset
from rafce_ray.data.loader import ImageSource, TrainLoader, balancing_weights, epoch_order, step_seed
from rafce_ray.data.records import Targets
from rafce_ray.errors import UsageError
from rafce_ray.taxonomy import make_taxonomy


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


def test_image_source_follows_the_order_it_is_asked_for():
    data = dataset([0] * 10)
    source = ImageSource(data, np.arange(10), torch.device("cpu"))
    batches = list(source.gather_all([np.array([7, 2]), np.array([9])]))
    assert [batch[:, 0, 0, 0].tolist() for batch in batches] == [[7, 2], [9]]
