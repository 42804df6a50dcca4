import asyncio
import random

import pytest

from rafce_ray.service.batching import Admission
from rafce_ray.service.problems import Problem


def test_beyond_the_bound_in_requests_it_is_busy_at_once():
    admission = Admission(2, 1000)
    with admission.place(10), admission.place(20):
        assert (admission.num_requests, admission.num_bytes) == (2, 30)
        with pytest.raises(Problem) as caught:
            admission.place(0)
        assert (caught.value.status, caught.value.headers) == (429, {"retry-after": "1"})
        assert admission.num_refused == 1
    assert (admission.num_requests, admission.num_bytes) == (0, 0)


def test_beyond_the_bound_in_bytes_it_is_busy_at_once():
    admission = Admission(9, 100)
    with admission.place(60):
        with pytest.raises(Problem, match="busy"):
            admission.place(41)
        with admission.place(40):
            assert admission.num_bytes == 100


def test_bytes_of_unknown_number_count_as_they_come():
    admission = Admission(9, 100)
    with admission.place() as first, admission.place(50):
        first.hold(30)
        first.hold(20)
        first.hold(50)
        assert admission.num_bytes == 100
        with pytest.raises(Problem, match="busy"):
            first.hold(51)
        assert admission.num_bytes == 100
    assert admission.num_bytes == 0


def test_a_declared_body_is_not_counted_twice():
    admission = Admission(9, 100)
    with admission.place(70) as place:
        place.hold(10)
        place.hold(70)
        assert admission.num_bytes == 70


def test_failed_and_cancelled_requests_give_their_places_back():
    admission = Admission(100, 10_000)

    async def request(number: int) -> None:
        with admission.place(number) as place:
            await asyncio.sleep(0)
            place.hold(2 * number)
            if number % 3 == 0:
                raise RuntimeError
            await asyncio.sleep(0 if number % 3 == 1 else 3600)

    async def run() -> list[object]:
        tasks = [asyncio.create_task(request(number)) for number in range(50)]
        for _ in range(4):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = asyncio.run(run())
    assert {type(outcome) for outcome in outcomes} == {type(None), RuntimeError, asyncio.CancelledError}
    assert (admission.num_requests, admission.num_bytes) == (0, 0)


def test_the_bounds_hold_whatever_comes():
    chance, admission, places = random.Random(0), Admission(5, 100), []
    refused = 0
    for _ in range(2000):
        try:
            if places and chance.random() < 0.4:
                places.pop(chance.randrange(len(places))).__exit__(None, None, None)
            elif places and chance.random() < 0.5:
                chance.choice(places).hold(chance.randrange(60))
            else:
                places.append(admission.place(chance.randrange(60)))
        except Problem:
            refused += 1
        assert admission.num_requests == len(places) <= 5
        assert admission.num_bytes == sum(place.num_bytes for place in places) <= 100
    assert refused == admission.num_refused > 100
