"""Write a dataset of drawn faces in RAF-CE's layout, proportions and noise, for demonstrations and tests.

RAF-CE may not be shipped; this stands in for it. Class, AUs and votes decide the expression and nothing else: person,
light, camera and file number come from streams of the seed that never see a label.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator, SeedSequence

from rafce_ray.data.drawing.appearance import sample_person, sample_scene
from rafce_ray.data.drawing.face import draw_face
from rafce_ray.data.synthetic_labels import SPLITS, FaceLabel, LabelPlan, draw_label, plan_labels
from rafce_ray.errors import UsageError
from rafce_ray.taxonomy import RAFCE_EMOTIONS

_CHUNK = 64
_PLAN_STREAM, _LABEL_STREAM, _APPEARANCE_STREAM = range(3)


@dataclass(frozen=True)
class SyntheticSummary:
    """What was written: labelled images, images without a label row, labelled images per split."""

    root: Path
    num_labelled: int
    num_extras: int
    per_split: dict[str, int]


@dataclass(frozen=True)
class _Task:
    """One face to draw: its index in the numbering from 0, file stem, class (-1 none) and odd token (-1 none)."""

    index: int
    stem: str
    emotion: int
    odd_token: int


@dataclass(frozen=True)
class _Row:
    """The text that a drawn face adds to the label files."""

    votes: str
    tokens: str


def _stream(seed: int, stream: int, index: int = 0) -> Generator:
    """An independent random stream per purpose and image, so neither order nor number of processes matters."""
    return np.random.default_rng(SeedSequence(seed, spawn_key=(stream, index)))


def synthesize(
    out: Path | str,
    num_images: int = 4549,
    seed: int = 0,
    *,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SyntheticSummary:
    """Draw `num_images` labelled faces, and unlabelled ones in proportion, into a new folder in RAF-CE's layout.

    The folder appears whole or not at all. The same seed and number give the same bytes on any number of processes
    (default: one per CPU); `progress(done, total)` is called after every few dozen images, extras included.

    Raises:
        UsageError: `out` exists and is not an empty folder, `num_images` is below 1, or `seed` or `processes` is
            out of range.
    """
    root = Path(os.path.expanduser(out)).absolute()
    _check_arguments(root, seed, processes)
    plan = plan_labels(num_images, _stream(seed, _PLAN_STREAM))
    tasks = _tasks(plan)
    root.parent.mkdir(parents=True, exist_ok=True)
    beside = root.with_name(f".{root.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        (beside / "aligned").mkdir(parents=True)
        rows = _draw_all(tasks, beside / "aligned", seed, processes or os.cpu_count() or 1, progress)
        _write_labels(beside, plan, tasks, rows)
        os.rename(beside, root)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    per_split = {name: int((plan.split == code).sum()) for code, name in enumerate(SPLITS)}
    return SyntheticSummary(root, num_images, len(tasks) - num_images, per_split)


def _check_arguments(root: Path, seed: int, processes: int | None) -> None:
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(f"{root} already exists and is not an empty folder; name a new folder or remove it first.")
    if seed < 0:
        raise UsageError(f"seed is {seed}; expected 0 or more.")
    if processes is not None and processes < 1:
        raise UsageError(f"processes is {processes}; expected at least 1.")


def _tasks(plan: LabelPlan) -> list[_Task]:
    width = max(4, len(str(len(plan.emotion))))
    return [
        _Task(index, f"{index + 1:0{width}d}", int(emotion), int(odd))
        for index, (emotion, odd) in enumerate(zip(plan.emotion, plan.odd_token, strict=True))
    ]


def _draw_all(
    tasks: list[_Task], folder: Path, seed: int, processes: int, progress: Callable[[int, int], None] | None
) -> list[_Row]:
    """Draw every face; rows come back in the order of the tasks."""
    chunks = [tasks[start : start + _CHUNK] for start in range(0, len(tasks), _CHUNK)]
    rows: list[_Row] = []
    for drawn in _drawn_chunks(chunks, folder, seed, min(processes, len(chunks))):
        rows += drawn
        if progress is not None:
            progress(len(rows), len(tasks))
    return rows


def _drawn_chunks(chunks: list[list[_Task]], folder: Path, seed: int, processes: int) -> Iterator[list[_Row]]:
    """Draw chunks in order, on this process alone or on a pool with a bounded queue."""
    if processes == 1:
        for chunk in chunks:
            yield _draw_chunk(chunk, folder, seed)
        return
    # spawn: forking a process in which torch or Ray runs threads can hang
    with ProcessPoolExecutor(processes, get_context("spawn"), _use_one_thread) as pool:
        waiting: deque[Future[list[_Row]]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_draw_chunk, chunk, folder, seed))
                if len(waiting) > 3 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _use_one_thread() -> None:
    """Each process has a core of its own; OpenCV's threads would only get in the way."""
    cv2.setNumThreads(1)


def _draw_chunk(chunk: list[_Task], folder: Path, seed: int) -> list[_Row]:
    return [_draw_one(task, folder, seed) for task in chunk]


def _draw_one(task: _Task, folder: Path, seed: int) -> _Row:
    """Draw one face to its file and return its label text; a face without a label shows some class all the same."""
    label_rng = _stream(seed, _LABEL_STREAM, task.index)
    emotion = task.emotion if task.emotion >= 0 else int(label_rng.integers(len(RAFCE_EMOTIONS)))
    label: FaceLabel = draw_label(emotion, task.odd_token, label_rng)
    appearance_rng = _stream(seed, _APPEARANCE_STREAM, task.index)
    person, scene = sample_person(appearance_rng), sample_scene(appearance_rng)
    image = draw_face(label.actions, person, scene)
    path = folder / f"{task.stem}_aligned.jpg"
    encoded = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, scene.jpeg_quality])[1]
    path.write_bytes(encoded.tobytes())
    return _Row(" ".join(f"{share:.6g}" for share in label.votes), "+".join(label.tokens))


def _write_labels(root: Path, plan: LabelPlan, tasks: list[_Task], rows: list[_Row]) -> None:
    """Write the four label files: one blank between columns, LF between rows, none at the end."""
    labelled = [task for task in tasks if task.emotion >= 0]
    columns = {
        "RAFCE_emolabel.txt": [str(task.emotion) for task in labelled],
        "RAFCE_partition.txt": [str(plan.split[task.index]) for task in labelled],
        "RAFCE_AUlabel.txt": ["null" if plan.is_null[task.index] else rows[task.index].tokens for task in labelled],
        "distribution.txt": [rows[task.index].votes for task in labelled],
    }
    for name, values in columns.items():
        lines = (f"{task.stem}.jpg {value}" for task, value in zip(labelled, values, strict=True))
        (root / name).write_bytes("\n".join(lines).encode("ascii"))
