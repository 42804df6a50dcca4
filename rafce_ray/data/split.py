"""Splits for a dataset that has none: stratified, and by person where a column says who is seen."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rafce_ray.base.errors import GateError, UsageError
from rafce_ray.base.storage import Location, locate
from rafce_ray.config import DataConfig
from rafce_ray.data import label_file, table
from rafce_ray.data.audit import WITHOUT_SPLITS
from rafce_ray.data.label_file import title_key
from rafce_ray.data.labels import read_labels
from rafce_ray.data.records import SPLITS, Labels

FRACTIONS = (0.7, 0.15, 0.15)
"""Shares of train, validation and test."""

_DRAWS, _STRATIFIED_DRAWS = 200, 20
"""Random splits, by group and by class. The one with the nearest shares of classes, action units and size is taken."""


@dataclass(frozen=True)
class NewSplit:
    """The file that was written, the root by which it is read, and what is in each split.

    ``num_groups``: distinct values of the column ``by``, None without one. ``num_alone``: images without a value, each
    a group of its own. ``columns``: titles of the table. ``person``: the one that names the person, None without one.
    """

    written: Location
    root: Location
    num_images: dict[str, int]
    num_groups: dict[str, int] | None
    num_alone: int
    columns: tuple[str, ...]
    person: str | None


def write_split(
    data: DataConfig, *, by: str | None = None, fractions: tuple[float, float, float] = FRACTIONS, seed: int = 0
) -> NewSplit:
    """Write a copy of a dataset's labels with a split for every image, next to the original, which stays as it is.

    A table ``labels.csv`` gives ``labels.split.csv``, class folders a table of that name, and RAF-CE's files the
    partition file that they lack. ``by``: images with the same value in this column go to the same split.

    Raises:
        UsageError: the file to write exists, there is no such column, or it has fewer values than there are splits.
        GateError: the labels cannot be read soundly.
    """
    labels = read_for_copy(data)
    source = table.find_table(locate(str(data.root))) if labels.layout == "table" else None
    stem, _, ending = ("labels.csv" if source is None else source.name).rpartition(".")
    written = labels.root / (label_file.PARTITION_FILE if labels.layout == "rafce" else f"{stem}.split.{ending}")
    if written.exists():
        aside = shlex.quote(f"{written.shown}.old")
        raise UsageError(
            f"{written}: exists already, and nothing is overwritten. Move it away: mv {written.command} {aside}"
        )
    cells = None if source is None else table.read_cells(source, data)
    names = labels.table["name"].to_pylist()
    groups = None
    if by is not None:
        of_name = _column(cells, by, labels)
        groups = np.array([of_name.get(name, "") for name in names])
    codes = assign(*_labelled(labels.table), groups, fractions, seed)
    split_of = {name: SPLITS[code] for name, code in zip(names, codes.tolist(), strict=True)}
    if cells is not None:
        written.write_bytes(_copied(cells, split_of))
    elif labels.layout == "rafce":
        code_of = {split: code for code, split in label_file.PARTITIONS.items()}
        written.write_bytes("".join(f"{name} {code_of[split]}\n" for name, split in split_of.items()).encode())
    elif labels.layout == "folders":
        rows = zip(names, split_of.values(), labels.table["emotion"].to_pylist(), strict=True)
        written.write_bytes(csv_bytes(["name", "split", "emotion"], rows))
    elif labels.layout != "table":
        # A new layout must say here how a copy keeps all of its labels.
        assert_never(labels.layout)
    of_split = {split: codes == code for code, split in enumerate(SPLITS)}
    num_groups = None
    if groups is not None:
        num_groups = {split: len(set(groups[mask]) - {""}) for split, mask in of_split.items()}
    person = None if cells is None else cells.columns.person
    header = () if cells is None else cells.columns.header
    return NewSplit(
        written=written,
        root=labels.root if labels.layout == "rafce" else written,
        num_images={split: int(mask.sum()) for split, mask in of_split.items()},
        num_groups=num_groups,
        num_alone=0 if groups is None else int((groups == "").sum()),
        columns=header,
        person=None if person is None else header[person],
    )


def read_for_copy(data: DataConfig) -> Labels:
    """Labels of which a copy can be written, with or without splits. GateError where they cannot be read soundly."""
    labels = read_labels(data)
    faults = [one for one in labels.findings if one.level == "refusal" and one.code not in WITHOUT_SPLITS]
    if faults:
        raise GateError("\n".join(f"{one.message}. {one.remedy}".strip() for one in faults))
    return labels


def assign(
    emotions: npt.NDArray[np.int64],
    action_units: npt.NDArray[np.bool_],
    groups: npt.NDArray[np.str_] | None = None,
    fractions: tuple[float, float, float] = FRACTIONS,
    seed: int = 0,
) -> npt.NDArray[np.int8]:
    """(N,) index into ``SPLITS`` of each image: classes and action units in proportion, every group in one split.

    ``emotions`` (N,) are classes, ``action_units`` (N, A) those that are present; ``groups`` (N,) names of groups,
    ``""`` for none. The same arguments give the same splits.

    Raises:
        UsageError: there are fewer images or groups than splits.
    """
    wanted = sum(fraction > 0 for fraction in fractions)
    units = np.arange(len(emotions))
    if groups is not None:
        units = np.unique(groups, return_inverse=True)[1].astype(np.int64)
        units[groups == ""] = len(groups) + np.arange(np.count_nonzero(groups == ""))
    num_units = len(np.unique(units))
    if num_units < wanted:
        what = "images" if groups is None else "groups"
        raise UsageError(f"{num_units} {what} cannot be divided among {wanted} splits: each needs one at least.")
    classes = np.unique(emotions, return_inverse=True)[1]
    traits = np.column_stack([np.eye(classes.max() + 1, dtype=bool)[classes], action_units])
    splits = np.zeros(len(emotions), np.int8)
    rest, left = np.arange(len(emotions)), 1.0
    # The last split first: each takes its share of what is left, and train keeps the rest.
    for code in (2, 1):
        if fractions[code] > 0:
            among = None if groups is None else units[rest]
            chosen = _draw(classes[rest], traits[rest], among, fractions[code] / left, seed)
            splits[rest[chosen]] = code
            rest, left = np.delete(rest, chosen), left - fractions[code]
    return splits


def _draw(
    classes: npt.NDArray[np.int64],
    traits: npt.NDArray[np.bool_],
    groups: npt.NDArray[np.int64] | None,
    share: float,
    seed: int,
) -> npt.NDArray[np.int64]:
    """Positions of about a ``share`` of the images: of many draws, the one nearest to it in each trait (N, T)."""
    # scikit-learn takes a second to import, which no other verb of data need wait for.
    from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit, StratifiedShuffleSplit

    num_units = len(classes) if groups is None else len(np.unique(groups))
    size = min(max(round(share * num_units), 1), num_units - 1)
    in_all = np.maximum(traits.sum(axis=0), 1)

    def distance(chosen: npt.NDArray[np.int64]) -> float:
        shares = traits[chosen].sum(axis=0) / in_all
        return float(np.abs(shares - share)[traits.any(axis=0)].mean() + abs(len(chosen) / len(classes) - share))

    if groups is not None:
        draws = GroupShuffleSplit(_DRAWS, test_size=size, random_state=seed)
    else:
        # Stratification needs two images of a class: single ones count for the largest.
        _, classes, counts = np.unique(classes, return_inverse=True, return_counts=True)
        classes = np.where(counts[classes] < 2, counts.argmax(), classes)
        enough = min(size, num_units - size) >= len(np.unique(classes))
        splitter = StratifiedShuffleSplit if enough else ShuffleSplit
        draws = splitter(_STRATIFIED_DRAWS, test_size=size, random_state=seed)
    nearest: npt.NDArray[np.int64] = min((chosen for _, chosen in draws.split(traits, classes, groups)), key=distance)
    return nearest


def _labelled(labels_table: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """(N,) class of each image, an unknown one for itself, and (N, A) the action units that are present."""
    emotions = np.array([emotion or "" for emotion in labels_table["emotion"].to_pylist()])
    lists = labels_table["au_positive"].to_pylist()
    numbers = sorted({number for one in lists for number in one})
    present = np.array([np.isin(numbers, one) for one in lists], bool).reshape(len(lists), len(numbers))
    return np.unique(emotions, return_inverse=True)[1].astype(np.int64), present


def _column(cells: table.Cells | None, title: str, labels: Labels) -> dict[str, str]:
    """The cell of a column for each image name."""
    if cells is None:
        raise UsageError(f"--by {title}: {labels.root} has no table, and so no columns. Leave --by out.")
    header = cells.columns.header
    wanted = [position for position, one in enumerate(header) if one == title]
    wanted = wanted or [position for position, one in enumerate(header) if title_key(one) == title_key(title)]
    if len(wanted) != 1:
        found = "no" if not wanted else "more than one"
        raise UsageError(f"--by {title}: {found} column of this title among {', '.join(header)}.")
    return {name: row[wanted[0]].strip() for name, row in cells.named_rows()}


def _copied(cells: table.Cells, split_of: Mapping[str, str]) -> bytes:
    """The table with its split column written, or with one more column."""
    name, split = cells.columns.name, cells.columns.split
    splits = [split_of.get(row[name].strip(), "") if name < len(row) else "" for row in cells.rows]
    if cells.parquet is not None:
        column = pa.array([one or None for one in splits], pa.string())
        if split is None:
            changed = cells.parquet.append_column("split", column)
        else:
            changed = cells.parquet.set_column(split, cells.parquet.column_names[split], column)
        sink = io.BytesIO()
        pq.write_table(changed, sink)
        return sink.getvalue()
    if split is None:
        rows = [[*row, one] for row, one in zip(cells.rows, splits, strict=True)]
        return csv_bytes([*cells.columns.header, "split"], rows, cells.delimiter)
    for row, one in zip(cells.rows, splits, strict=True):
        row[split : split + 1] = [one] if split < len(row) else []
    return csv_bytes(cells.columns.header, cells.rows, cells.delimiter)


def csv_bytes(header: Iterable[str], rows: Iterable[Iterable[str]], delimiter: str = ",") -> bytes:
    """A CSV file in UTF-8."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()
