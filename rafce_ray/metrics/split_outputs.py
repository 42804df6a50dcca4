"""A split's images with their targets and a model's raw outputs, as one Parquet file: what every later look at a run starts from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rafce_ray.base.errors import RafceError
from rafce_ray.metrics.calibration import Outputs


@dataclass(frozen=True)
class SplitOutputs:
    """Row i of all of it is image ``names[i]``: emotion (N,) int64, -1 unknown; action_units (N, A) float32, NaN unknown."""

    names: list[str]
    emotion: NDArray[np.int64]
    action_units: NDArray[np.float32]
    outputs: Outputs

    def to_parquet(self) -> bytes:
        """As the bytes of a Parquet file."""
        sink = pa.BufferOutputStream()
        columns = {
            "name": pa.array(self.names, pa.string()),
            "emotion": pa.array(self.emotion),
            "action_units": _lists(self.action_units),
            "emotion_logits": _lists(self.outputs.emotion),
            "action_unit_logits": _lists(self.outputs.action_units),
        }
        pq.write_table(pa.table(columns), sink, compression="zstd")
        return bytes(sink.getvalue())

    @classmethod
    def from_parquet(cls, content: bytes) -> SplitOutputs:
        """What :meth:`to_parquet` wrote. RafceError where it is something else, or damaged."""
        try:
            table = pq.read_table(pa.BufferReader(content))
            return cls(
                names=table["name"].to_pylist(),
                emotion=table["emotion"].to_numpy(),
                action_units=_matrix(table["action_units"]),
                outputs=Outputs(_matrix(table["emotion_logits"]), _matrix(table["action_unit_logits"])),
            )
        except (pa.ArrowException, OSError, KeyError) as error:
            raise RafceError(f"the raw outputs of a split cannot be read ({error})") from error


def _lists(values: NDArray[np.float32]) -> pa.FixedSizeListArray | pa.ListArray:
    num_rows, num_columns = values.shape
    if num_columns == 0:
        return pa.array([[]] * num_rows, pa.list_(pa.float32()))
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values, np.float32).ravel()), num_columns)


def _matrix(column: pa.ChunkedArray) -> NDArray[np.float32]:
    num_columns = column.type.list_size if pa.types.is_fixed_size_list(column.type) else 0
    flat = np.asarray(column.combine_chunks().flatten(), dtype=np.float32)
    return flat.reshape(len(column), num_columns)
