"""What every check of an audit looks at."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rafce_ray.config import DataConfig
from rafce_ray.data.records import SPLITS, Evidence, Labels, Targets, evidence_of
from rafce_ray.taxonomy import RAFCE_EMOTIONS, Taxonomy


@dataclass(frozen=True)
class Case:
    """What every check looks at; ``usable`` marks train rows that have an image, whose action units are
    counted in ``train_known`` and ``train_positives`` (A,)."""

    labels: Labels
    taxonomy: Taxonomy
    targets: Targets
    data: DataConfig
    usable: npt.NDArray[np.bool_]
    train_known: npt.NDArray[np.int64]
    train_positives: npt.NDArray[np.int64]

    @property
    def has_rafce_classes(self) -> bool:
        """Whether layout and classes are RAF-CE's, so that its published counts say what is natural."""
        return self.labels.layout == "rafce" and self.taxonomy.emotions == tuple(RAFCE_EMOTIONS)

    @property
    def all_images_missing(self) -> bool:
        """Whether no row has an image. That alone is refused; its consequences are not reported."""
        paths = self.labels.table["image_path"]
        return len(paths) > 0 and paths.null_count == len(paths)

    def split_sizes(self) -> dict[str, int]:
        """Labelled rows per split."""
        return {split: int((self.targets.split == code).sum()) for code, split in enumerate(SPLITS)}

    def rows(
        self, mask: npt.NDArray[np.bool_], file: str | None, line_column: str, value_column: str | None
    ) -> tuple[Evidence, ...]:
        """Evidence for label rows, with their line."""
        table = self.labels.table
        return evidence_of(
            Evidence(
                str(table["name"][row].as_py()) + (f": {table[value_column][row].as_py()!r}" if value_column else ""),
                file,
                table[line_column][row].as_py(),
            )
            for row in np.flatnonzero(mask).tolist()
        )


def count_action_units(
    action_units: npt.NDArray[np.float32], rows: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Known and positive elements per action unit, (A,) each, among the rows (N,) of the targets (N, A)."""
    # Column by column: copies of the whole matrix would show in the memory of large datasets.
    known = np.zeros(action_units.shape[1], np.int64)
    positives = np.zeros(action_units.shape[1], np.int64)
    for column in range(action_units.shape[1]):
        values = action_units[rows, column]
        known[column] = np.count_nonzero(~np.isnan(values))
        positives[column] = np.count_nonzero(values == 1)
    return known, positives


def value_counts(column: pa.ChunkedArray) -> list[tuple[str, int]]:
    """Distinct values that are not null, with their counts, the most frequent first."""
    counts = pc.value_counts(pc.drop_null(column)).to_pylist()
    return sorted(((item["values"], item["counts"]) for item in counts), key=lambda pair: -pair[1])


def audit_command(data: DataConfig, root: str | None = None, **changed: str) -> str:
    """The command that audits the data as they are read here; ``root``: where they are, unless ``data.root`` says it.

    ``changed``: keys of the section ``data`` to add, with their text.
    """
    keys = ("layout", "images", "encoding", "au_threshold")
    given = {key: getattr(data, key) for key in keys if getattr(data, key) != DataConfig.model_fields[key].default}
    given |= changed
    return shlex.join(["rafce", "data", "audit", root or str(data.root), *(f"data.{k}={v}" for k, v in given.items())])
