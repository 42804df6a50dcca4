"""Names as keys of a dataset."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc


def duplicate_groups(names: pa.Array) -> list[npt.NDArray[np.int64]]:
    """Rows of each name that is there more than once, ascending."""
    # Sorting takes a tenth of the memory of a hash table of names.
    order = pc.array_sort_indices(names)
    ordered = names.take(order)
    same = np.asarray(pc.equal(ordered[1:], ordered[:-1]))
    if not same.any():
        return []
    rows = np.asarray(order).astype(np.int64)
    groups = np.split(rows, np.flatnonzero(~same) + 1)
    return sorted((np.sort(group) for group in groups if len(group) > 1), key=lambda group: int(group[0]))
