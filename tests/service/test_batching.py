"""The inference thread: what a face's request gets is its own, whatever happens to the others in its batch."""

import asyncio
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from rafce_ray.base.errors import RafceError
from rafce_ray.metrics.calibration import Outputs
from rafce_ray.service.batching import Batcher, NotFiniteError


class Gate:
    """A predictor that waits for a sign before each batch, and notes the batches; a face of red 255 makes it fail, of
    red 254 gives NaN.
    """

    def __init__(self, predictor):
        self.bundle, self._predictor = predictor.bundle, predictor
        self.batches: list[int] = []
        self.began, self.go = threading.Event(), threading.Event()

    def outputs(self, images: np.ndarray) -> Outputs:
        self.began.set()
        assert self.go.wait(10)
        self.batches.append(len(images))
        if (images[:, 0, 0, 0] == 255).any():
            raise ValueError("the engine broke")
        found = self._predictor.outputs(images)
        emotion = found.emotion.copy()
        emotion[images[:, 0, 0, 0] == 254] = np.nan
        return Outputs(emotion, found.action_units)


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    batcher = Batcher(max_batch_faces=4)
    yield batcher
    batcher.close()


@pytest.fixture
def gate(predictor) -> Gate:
    return Gate(predictor)


async def begun(gate: Gate) -> None:
    await asyncio.get_running_loop().run_in_executor(None, gate.began.wait, 10)


@pytest.fixture
def marked(faces):
    """``marked(num, red)``: faces whose first pixel the gate knows or, with 0, surely does not."""

    def make(num: int, red: int = 0) -> np.ndarray:
        images = faces(num)
        images[:, 0, 0, 0] = red
        return images

    return make


def test_each_request_gets_its_own_rows_whoever_shares_its_batch(batcher, predictor, faces):
    sizes = [1, 3, 2, 7, 1, 1]
    images = [faces(size, seed) for seed, size in enumerate(sizes)]

    async def together():
        return await asyncio.gather(*(batcher.probabilities(predictor, one) for one in images))

    for found, one in zip(asyncio.run(together()), images, strict=True):
        alone = predictor.probabilities(one)
        np.testing.assert_allclose(found.probabilities.emotion, alone.emotion, atol=1e-6)
        np.testing.assert_allclose(found.probabilities.action_units, alone.action_units, atol=1e-6)
        assert found.queue_s >= 0
        assert found.inference_s > 0


def test_a_batch_is_whatever_gathered_while_the_one_before_ran(batcher, gate, marked):
    async def scenario():
        first = asyncio.create_task(batcher.probabilities(gate, marked(1)))
        await begun(gate)
        others = [asyncio.create_task(batcher.probabilities(gate, marked(size))) for size in (2, 2, 1, 6)]
        await asyncio.sleep(0)
        gate.go.set()
        await asyncio.gather(first, *others)

    asyncio.run(scenario())
    # 1 began alone; 2 + 2 fill a batch of 4; 6 comes in parts of 4 and 2, and 1 has no room beside the 4.
    assert gate.batches == [1, 4, 1, 4, 2]


def test_models_do_not_share_a_batch(batcher, gate, predictor, marked):
    other = Gate(predictor)
    other.go.set()

    async def scenario():
        tasks = [asyncio.create_task(batcher.probabilities(gate, marked(1)))]
        await begun(gate)
        tasks += [asyncio.create_task(batcher.probabilities(one, marked(1))) for one in (gate, other, gate)]
        await asyncio.sleep(0)
        gate.go.set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert (gate.batches, other.batches) == ([1, 1, 1], [1])


def test_who_left_before_the_batch_costs_nothing(batcher, gate, marked):
    async def scenario():
        first = asyncio.create_task(batcher.probabilities(gate, marked(1)))
        await begun(gate)
        gone = [asyncio.create_task(batcher.probabilities(gate, marked(3))) for _ in range(5)]
        stays = asyncio.create_task(batcher.probabilities(gate, marked(2)))
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        await asyncio.sleep(0)
        gate.go.set()
        await asyncio.gather(first, stays)

    asyncio.run(scenario())
    assert gate.batches == [1, 2]


def test_a_large_request_that_is_given_up_costs_one_batch(batcher, gate, marked):
    async def scenario():
        large = asyncio.create_task(batcher.probabilities(gate, marked(40)))
        await begun(gate)
        large.cancel()
        await asyncio.sleep(0)
        gate.go.set()
        await batcher.probabilities(gate, marked(1))

    asyncio.run(scenario())
    assert gate.batches == [4, 1]


def test_an_engine_that_breaks_fails_only_its_own_batch(batcher, gate, marked):
    async def scenario():
        first = asyncio.create_task(batcher.probabilities(gate, marked(1)))
        await begun(gate)
        broken = [asyncio.create_task(batcher.probabilities(gate, marked(2, 255))) for _ in range(2)]
        fine = asyncio.create_task(batcher.probabilities(gate, marked(4)))
        await asyncio.sleep(0)
        gate.go.set()
        return await asyncio.gather(first, *broken, fine, return_exceptions=True)

    first, one, other, fine = asyncio.run(scenario())
    assert [type(one), type(other)] == [ValueError, ValueError]
    assert len(first.probabilities.emotion) == 1
    assert len(fine.probabilities.emotion) == 4
    assert batcher.is_alive()


def test_what_is_no_number_is_an_error_and_only_of_its_request(batcher, gate, marked):
    gate.go.set()

    async def scenario():
        requests = [marked(1), marked(2, 254), marked(1)]
        return await asyncio.gather(*(batcher.probabilities(gate, one) for one in requests), return_exceptions=True)

    before, nan, after = asyncio.run(scenario())
    assert isinstance(nan, NotFiniteError)
    assert np.isfinite(before.probabilities.emotion).all()
    assert np.isfinite(after.probabilities.emotion).all()


def test_a_hung_engine_shows(batcher, gate, marked):
    async def scenario():
        assert batcher.busy_s() == 0
        task = asyncio.create_task(batcher.probabilities(gate, marked(1)))
        await begun(gate)
        busy = batcher.busy_s()
        gate.go.set()
        await task
        return busy

    assert asyncio.run(scenario()) > 0


def test_closing_finishes_what_waits_and_refuses_what_comes_after(predictor, faces):
    batcher = Batcher(max_batch_faces=4)

    async def scenario():
        waiting = asyncio.create_task(batcher.probabilities(predictor, faces(3)))
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, batcher.close)
        assert len((await waiting).probabilities.emotion) == 3
        with pytest.raises(RafceError, match="start the service again"):
            await batcher.probabilities(predictor, faces(1))

    asyncio.run(scenario())
