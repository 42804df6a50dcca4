"""A study's data, in every way in which its trials will read them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from rafce_ray.config import DataConfig
from rafce_ray.console import to_json
from rafce_ray.data.dataset import Prepared
from rafce_ray.errors import GateError
from rafce_ray.study.config import StudyConfig

READING = ("null_policy", "action_units", "min_train_positives", "stored_px")
"""Data keys that change what is read or decoded; the others change what is made of it in training."""


class Readings:
    """The study's data as its trials read them: prepared once for each way of reading."""

    def __init__(self, prepare: Callable[[DataConfig], Prepared]) -> None:
        self._prepare = prepare
        self._prepared: dict[str, Prepared] = {}

    def of(self, data: DataConfig) -> Prepared:
        """The data of one trial."""
        key = data.reading
        if key not in self._prepared:
            self._prepared[key] = self._prepare(data)
        return self._prepared[key]

    def prepare_all(self, study: StudyConfig) -> Prepared:
        """Read the data in every way that the study's trials will, before anything starts; returns the base's.

        Raises:
            GateError: read in one of these ways, the data may not be trained on.
        """
        base = self.of(study.base_config().data)
        domains = {key: study.space[key].values() for key in study.space if key.removeprefix("data.") in READING}
        for combination in product(*domains.values()):
            values = dict(zip(domains, combination, strict=True))
            try:
                self.of(study.config_of(values).data)
            except GateError as error:
                raise GateError(f"with {to_json(values)}: {error}") from error
        return base
