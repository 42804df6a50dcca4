"""What every check of an audit looks at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rafce_ray.config import DataConfig
from rafce_ray.data.records import SPLITS, Evidence, Labels, Targets, evidence_of
from rafce_ray.taxonomy import RAFCE_EMOTIONS, Taxonomy

MAX_UNREADABLE_SHARE = 0.01
"""Share of the labelled, non-null rows that may be unreadable before the dataset is refused."""


@dataclass(frozen=True)
class Case:
    """What every check looks at; ``usable`` marks train rows that have an image."""

    labels: Labels
    taxonomy: Taxonomy
    targets: Targets
    data: DataConfig
    usable: npt.NDArray[np.bool_]

    @property
    def has_rafce_classes(self) -> bool:
        """Whether layout and classes are RAF-CE's, so that its published counts say what is natural."""
        return self.labels.layout == "rafce" and self.taxonomy.emotions == tuple(RAFCE_EMOTIONS)

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


def value_counts(column: pa.ChunkedArray) -> list[tuple[str, int]]:
    """Distinct values that are not null, with their counts, the most frequent first."""
    counts = pc.value_counts(pc.drop_null(column)).to_pylist()
    return sorted(((item["values"], item["counts"]) for item in counts), key=lambda pair: -pair[1])
