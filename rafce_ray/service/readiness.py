"""Readiness: a canary went the whole way of a request, from PNG bytes to probabilities, and gave the stored answer."""

from __future__ import annotations

import asyncio
import io
import time

from PIL import Image

from rafce_ray.base.errors import RafceError
from rafce_ray.bundle.canary import probabilities_apart
from rafce_ray.bundle.engines import MAX_DIFFERENCE
from rafce_ray.metrics.calibration import Probabilities, calibrated
from rafce_ray.service.batching import Batcher
from rafce_ray.service.live import Served
from rafce_ray.service.problems import Problem
from rafce_ray.service.reading import Reader

FRESH_S = 1.0
"""Seconds for which a canary's success counts: whoever asks more often costs nothing."""


class Readiness:
    """Asks the canary, one at a time and at most once in ``FRESH_S`` seconds for one model."""

    def __init__(self, reader: Reader, batcher: Batcher, deadline_s: float) -> None:
        self._reader = reader
        self._batcher = batcher
        self._deadline_s = deadline_s
        self._asking = asyncio.Lock()
        self._ready: tuple[Served, float] | None = None

    async def check(self, served: Served) -> None:
        """Return when a canary of this model gave its answer.

        Raises:
            Problem: ``not_ready``: it gave another one, failed, or none in time.
        """
        async with self._asking:
            if self._ready is not None and self._ready[0] is served and time.monotonic() - self._ready[1] < FRESH_S:
                return
            self._ready = None
            try:
                async with asyncio.timeout(self._deadline_s):
                    found = await self._ask(served)
            except TimeoutError:
                raise Problem("not_ready", f"The canary had no answer within {self._deadline_s:g} s.") from None
            except RafceError as error:
                raise Problem("not_ready", f"The canary failed: {error}") from error
            off = _difference(found, served)
            if not off <= MAX_DIFFERENCE:
                raise Problem(
                    "not_ready",
                    f"The canary's probabilities are off by {off:.2g}; at most {MAX_DIFFERENCE:g} is expected.",
                )
            self._ready = served, time.monotonic()

    async def _ask(self, served: Served) -> Probabilities:
        stream = io.BytesIO()
        Image.fromarray(served.canary.images[0]).save(stream, "PNG")
        px = served.predictor.bundle.preprocessing.stored_px
        image = await self._reader.read(stream.getvalue(), px, "aligned")
        return (await self._batcher.probabilities(served.predictor, image.faces[0].pixels[None])).probabilities


def _difference(found: Probabilities, served: Served) -> float:
    """Largest difference of a probability of the first canary."""
    expected = calibrated(served.canary.outputs, served.predictor.bundle.calibration)
    return probabilities_apart(found, Probabilities(expected.emotion[:1], expected.action_units[:1]))
