"""Write a dataset of drawn faces in RAF-CE's layout, proportions and noise, for demonstrations and tests.

RAF-CE may not be shipped; this replaces it. Class, AUs and votes decide the expression and nothing else: person,
light, camera and file number come from streams of the seed that never see a label.

A label is made as RAF-CE's were: people vote for basic emotions and the top two name the class; experts code the AUs
of the face and miss a few. So both labels are noisy views of one face, and neither can be read without error.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import resources
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator, SeedSequence
from numpy.typing import NDArray

from rafce_drawing.paint import draw_face
from rafce_drawing.shape import Action, sample_person, sample_scene
from rafce_ray.base.errors import UsageError
from rafce_ray.base.storage import new_folder
from rafce_ray.base.taxonomy import BASIC_EMOTIONS, RAFCE_EMOTIONS
from rafce_ray.data.label_file import CLASS_COUNTS, NUM_LABELLED, NUM_NULL_TRAIN, TRAIN_POSITIVES

SPLITS = ("train", "test", "validation")
"""Splits in the order of RAF-CE's partition codes 0, 1, 2."""

_CLASS_COUNTS = np.column_stack([CLASS_COUNTS[split] for split in SPLITS])
_NULLS_PER_CLASS = np.array([14, 11, 10, 18, 15, 61, 1, 20, 1, 4, 85, 9, 0, 2])
_NULLS_PER_SPLIT = np.array([NUM_NULL_TRAIN, 65, 50])
_NUM_EXTRAS = 359  # images of RAF-CE without any label row

ODD_ACTIONS = {
    "AD19": Action(19, 0.8),
    "t23": Action(23, 0.8, "T"),
    "BL18": Action(18, 0.8, "BL"),
    "RB18": Action(18, 0.8, "RB"),
    "L12L": Action(12, 0.8, "L"),
}
"""Tokens that RAF-CE holds once each, and the action meant."""

_SIDED_RATES = {1: 0.03, 2: 0.15, 10: 0.10, 12: 0.10, 14: 0.5, 15: 0.08, 43: 0.06}
_LEFT_SHARE = 295 / 510  # RAF-CE holds 295 left and 215 right tokens
_TOP_RATES = {18: 0.06, 22: 0.05, 23: 0.2, 24: 0.3, 28: 0.2}
_BOTTOM_RATES = {18: 0.15, 22: 0.25, 23: 0.17, 24: 0.1, 28: 0.4}
"""Share of an AU's occurrences on one side or lip; which AUs carry them is assumed, the totals are RAF-CE's."""

_PROTOTYPE_RATE = 0.85  # "more than 70 % of people" in the table
_CARRY_OVER = 0.3  # share of a basic emotion's own rate that survives in a compound whose row does not list the AU
_MISS_RATE = 0.04  # of the AUs that are there, coders miss this share and report as many that are not
_MAX_ACTION_UNITS = 11
_BARE_TEETH = (16, 22)  # drawn with parted lips only

_EMPHASIS: dict[str, dict[int, float]] = {
    "surprised": {1: 1.2, 2: 1.3, 5: 1.25, 25: 1.1, 26: 1.3, 27: 1.3, 4: 0.7, 9: 0.7, 10: 0.75, 17: 0.7, 12: 0.9},
    "fearful": {1: 1.2, 2: 0.95, 4: 0.95, 5: 1.3, 20: 1.3, 25: 0.85, 26: 0.8, 10: 0.8, 12: 0.8, 16: 1.1},
    "disgusted": {9: 1.35, 10: 1.35, 17: 1.1, 4: 0.9, 25: 0.8, 1: 0.8, 2: 0.8, 16: 1.1, 26: 0.75},
    "happy": {12: 1.35, 6: 1.25, 25: 1.1, 4: 0.6, 10: 0.8, 26: 0.9},
    "sad": {1: 1.1, 15: 1.35, 4: 0.7, 17: 1.1, 25: 0.65, 26: 0.65, 2: 0.7, 7: 0.75, 12: 0.8, 10: 0.85, 43: 1.2},
    "angry": {4: 1.4, 7: 1.35, 24: 1.3, 23: 1.3, 22: 1.2, 10: 0.9, 17: 0.9, 1: 0.6, 2: 0.8, 25: 1.05, 5: 1.0},
}
"""How much stronger (above 1) or weaker an AU is shown under an emotion. Assumed: it lets the faces of two classes
with the same AU set differ in degree, as real ones do."""

_TRACE_MAX = 0.26  # below what a coder scores (FACS A)


@dataclass(frozen=True)
class Prototypes:
    """Shares of people who show an AU, (emotions, AUs), and RAF-CE's training positives per AU."""

    action_units: tuple[int, ...]
    basic: NDArray[np.float64]
    compound: NDArray[np.float64]
    target_rates: NDArray[np.float64]
    emphasis: NDArray[np.float64]


@dataclass(frozen=True)
class LabelPlan:
    """What each image is, by its place in the numbering; all arrays have one entry per image.

    `emotion` is -1 and `split` is -1 for an image without any label row; `odd_token` indexes `ODD_ACTIONS` or is -1.
    """

    emotion: NDArray[np.int8]
    split: NDArray[np.int8]
    is_null: NDArray[np.bool_]
    odd_token: NDArray[np.int8]


@dataclass(frozen=True)
class FaceLabel:
    """One face's expression and what people wrote down about it; `votes` (6,) are shares that sum to 1."""

    actions: tuple[Action, ...]
    votes: NDArray[np.float64]
    tokens: tuple[str, ...]


@cache
def prototypes() -> Prototypes:
    """The package's table of prototypes, with AUs in ascending order."""
    table = json.loads(resources.files("rafce_drawing").joinpath("facs_prototypes.json").read_text("utf-8"))
    positives = {int(key): count for key, count in table["rare_train_positives"].items()}
    positives |= {action_unit: count for action_unit, count in TRAIN_POSITIVES.items() if count > 0}
    action_units = tuple(sorted(positives))
    basic = np.array([_shares(table["basic"][name], action_units) for name in BASIC_EMOTIONS])
    for key, weights in table["assumed"].items():
        for name, weight in weights.items():
            row, column = BASIC_EMOTIONS.index(name), action_units.index(int(key))
            basic[row, column] = max(basic[row, column], weight / _CARRY_OVER)
    compound = np.array([_shares(table["compound"][name], action_units) for name in RAFCE_EMOTIONS])
    inherited = _CARRY_OVER * np.array([basic[list(pair)].mean(0) for pair in component_indices()])
    known_train = _CLASS_COUNTS[:, 0].sum() - _NULLS_PER_SPLIT[0]
    targets = np.array([positives[action_unit] for action_unit in action_units]) / known_train
    emphasis = np.array([[_EMPHASIS[name].get(a, 1.0) for a in action_units] for name in BASIC_EMOTIONS])
    return Prototypes(action_units, basic, np.maximum(compound, inherited), targets, emphasis)


def _shares(row: dict[str, Any], action_units: tuple[int, ...]) -> list[float]:
    return [_PROTOTYPE_RATE if a in row["most"] else row["shares"].get(str(a), 0.0) for a in action_units]


@cache
def component_indices() -> tuple[tuple[int, int], ...]:
    """For each class its two basic emotions as indices into `BASIC_EMOTIONS`."""
    return tuple((BASIC_EMOTIONS.index(a), BASIC_EMOTIONS.index(b)) for a, b in RAFCE_EMOTIONS.values())


@cache
def action_unit_rates() -> NDArray[np.float64]:
    """Probability (classes, AUs) of an AU under a class: the table's odds, shifted per AU to RAF-CE's total rate.

    In the wild AUs are rarer or more common than when people pose (AU20 about a third, AU25 more); one shift of the
    log odds per AU keeps the table's order of the classes and gets the total right.
    """
    table = prototypes()
    weights = (_CLASS_COUNTS.sum(1) - _NULLS_PER_CLASS).astype(np.float64)
    weights = np.repeat((weights / weights.sum())[:, None], len(table.action_units), axis=1)
    rates = _shift_odds(table.compound, weights, table.target_rates)
    parted = rates[:, table.action_units.index(25)]
    for action_unit in _BARE_TEETH:  # their row of the table holds among parted lips only
        weights[:, table.action_units.index(action_unit)] *= parted
    rates = _shift_odds(table.compound, weights, table.target_rates)
    for action_unit in _BARE_TEETH:
        rates[:, table.action_units.index(action_unit)] *= parted
    return rates


def _shift_odds(
    shares: NDArray[np.float64], weights: NDArray[np.float64], targets: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Shift each column's log odds until its weighted sum over the rows is the column's target."""
    clipped = np.clip(shares, 0.002, 0.97)
    odds = np.log(clipped) - np.log1p(-clipped)
    low, high = np.full(odds.shape[1], -12.0), np.full(odds.shape[1], 12.0)
    for _ in range(50):
        shift = 0.5 * (low + high)
        too_many = (weights / (1.0 + np.exp(-odds - shift))).sum(0) > targets
        low, high = np.where(too_many, low, shift), np.where(too_many, shift, high)
    return np.asarray(1.0 / (1.0 + np.exp(-odds - shift)), np.float64)


def _apportion(weights: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Share `total` out in proportion to the weights by largest remainders; exact where total is their sum."""
    exact = weights.ravel() * (total / weights.sum())
    shares = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(-(exact - shares), kind="stable")
    shares[order[: total - int(shares.sum())]] += 1
    return np.asarray(shares.reshape(weights.shape))


def split_counts(num_images: int) -> NDArray[np.int64]:
    """Images per class and split, (14, 3): RAF-CE's table at 4549, else in its proportions.

    Every class gets a training image where there are at least as many images as classes.

    Raises:
        UsageError: num_images is below 1.
    """
    if num_images < 1:
        raise UsageError(f"num_images is {num_images}; expected at least 1. RAF-CE itself has {NUM_LABELLED}.")
    counts = _apportion(_CLASS_COUNTS, num_images)
    if num_images >= len(counts):
        for missing in np.flatnonzero(counts[:, 0] == 0):
            spare = counts - np.array([1, 0, 0])  # what may be given away: never the last training image of a class
            own = counts[missing].any()
            donor = (missing, np.argmax(counts[missing])) if own else np.unravel_index(np.argmax(spare), spare.shape)
            counts[donor] -= 1
            counts[missing, 0] += 1
    return counts


def num_extras(num_images: int) -> int:
    """How many images without any label row go with that many labelled ones; 359 with 4549."""
    return round(num_images * _NUM_EXTRAS / NUM_LABELLED)


def plan_labels(num_images: int, rng: Generator) -> LabelPlan:
    """Decide class, split, null and odd tokens of every image; which number gets what is left to chance."""
    counts = split_counts(num_images)
    emotion = np.repeat(np.arange(len(counts)), counts.sum(1))
    split = np.concatenate([np.repeat(np.arange(3), row) for row in counts])
    is_null = _choose_nulls(emotion, split, rng)
    odd = np.full(num_images, -1)
    candidates = np.flatnonzero(~is_null)
    wanted = np.tile(np.arange(len(ODD_ACTIONS)), -(-num_images // NUM_LABELLED))[: len(candidates)]
    odd[rng.choice(candidates, len(wanted), replace=False)] = wanted
    total = num_images + num_extras(num_images)
    order = rng.permutation(total)[:num_images]
    columns = []
    for values in (emotion, split, odd):
        column = np.full(total, -1, np.int8)
        column[order] = values
        columns.append(column)
    null_column = np.zeros(total, np.bool_)
    null_column[order] = is_null
    return LabelPlan(columns[0], columns[1], null_column, columns[2])


def _choose_nulls(emotion: NDArray[np.int64], split: NDArray[np.int64], rng: Generator) -> NDArray[np.bool_]:
    """Rows whose AU label is `null`: RAF-CE's number per class, and per split as far as both can be had."""
    share = len(emotion) / NUM_LABELLED
    per_class = _apportion(_NULLS_PER_CLASS, round(share * int(_NULLS_PER_CLASS.sum())))
    quota = _apportion(_NULLS_PER_SPLIT, int(per_class.sum()))
    is_null = np.zeros(len(emotion), np.bool_)
    for name in rng.permutation(np.repeat(np.arange(len(per_class)), per_class)):
        free = (emotion == name) & ~is_null
        if not free.any():
            continue
        room = np.array([quota[k] if (free & (split == k)).any() else 0 for k in range(3)], np.float64)
        if room.sum() > 0:
            chosen = rng.choice(3, p=room / room.sum())
            quota[chosen] -= 1
            free &= split == chosen
        is_null[rng.choice(np.flatnonzero(free))] = True
    return is_null


_SECOND_CROWD = 120  # about one label in twenty then belies its face
_CLOSE_VOTES = {8: 2, 12: 1, 13: 4}  # class: at most so many votes between its second emotion and the best other


def draw_votes(emotion: int, rng: Generator) -> NDArray[np.float64]:
    """Shares (6,) of 23 to 35 crowd votes in the order of `BASIC_EMOTIONS`.

    The two largest name the class in 98.5 % of the rows. Drawing the votes again names it in about 86 % of them
    (58, 54 and 69 % for the rare classes 8, 12 and 13), as in RAF-CE.
    """
    pair = list(component_indices()[emotion])
    agrees = rng.random() < 0.985
    for _ in range(200):
        belief = rng.dirichlet(np.full(6, 0.6))
        balance = rng.beta(3.2, 3.2)
        support = rng.beta(4.0, 2.0)
        belief *= 1.0 - support
        belief[pair] += support * np.array([balance, 1.0 - balance])
        votes = rng.multinomial(int(rng.integers(23, 36)), belief)
        lead = votes[pair].min() - np.delete(votes, pair).max()
        if (lead > 0) == agrees and lead <= _CLOSE_VOTES.get(emotion, 35):
            break
    return np.asarray(votes / votes.sum(), np.float64)


def shown_emotion(emotion: int, votes: NDArray[np.float64], rng: Generator) -> int:
    """The class that a larger crowd of the same opinion would have named: the face is drawn for this one."""
    again = rng.multinomial(_SECOND_CROWD, votes) + 0.01 * rng.random(6)
    top = set(np.argsort(again)[-2:].tolist())
    named = [index for index, pair in enumerate(component_indices()) if set(pair) == top]
    return named[0] if named else emotion


def draw_label(emotion: int, odd_token: int, rng: Generator) -> FaceLabel:
    """Draw votes, the expression behind them, and the AU tokens an expert would write for a class."""
    votes = draw_votes(emotion, rng)
    shown = shown_emotion(emotion, votes, rng)
    first, second = component_indices()[shown]
    lead = (votes[first] + 0.1) / (votes[first] + votes[second] + 0.2)
    odd_name = list(ODD_ACTIONS)[odd_token] if odd_token >= 0 else None
    table = prototypes()
    tokens: tuple[str, ...] = ()
    while not tokens:  # an expert who finds nothing writes null, which is planned elsewhere
        present = _draw_present(shown, rng)
        if odd_name is not None:
            present[table.action_units.index(ODD_ACTIONS[odd_name].action_unit)] = True
        actions = _draw_actions(present, lead * table.emphasis[first] + (1.0 - lead) * table.emphasis[second], rng)
        if odd_name is not None:
            odd = ODD_ACTIONS[odd_name]
            actions = [odd if action.action_unit == odd.action_unit else action for action in actions]
        tokens = _code(actions, odd_name, rng)
    affinity = lead * table.basic[first] + (1.0 - lead) * table.basic[second]
    return FaceLabel((*actions, *_draw_traces(present, affinity, rng)), votes, tokens)


def _draw_present(shown: int, rng: Generator) -> NDArray[np.bool_]:
    """Which AUs show, (AUs,): each at its class's rate, but lips either part or press, and a jaw drops one way."""
    rates = action_unit_rates()[shown]
    present = rng.random(len(rates)) < rates
    at = {action_unit: column for column, action_unit in enumerate(prototypes().action_units)}
    mouth = rng.random()
    parted = float(rates[at[25]])
    present[at[25]] = mouth < parted
    present[at[27]] = mouth < rates[at[27]]
    present[at[26]] = rates[at[27]] <= mouth < rates[at[27]] + rates[at[26]]
    present[at[24]] = mouth > 1.0 - rates[at[24]]
    present[at[28]] = 1.0 - rates[at[24]] - rates[at[28]] < mouth <= 1.0 - rates[at[24]]
    for depends in _BARE_TEETH:
        present[at[depends]] = mouth < parted and rng.random() < rates[at[depends]] / parted
    present[at[5]] &= not present[at[43]]
    extra = np.flatnonzero(present)
    if len(extra) > _MAX_ACTION_UNITS:
        present[rng.choice(extra, len(extra) - _MAX_ACTION_UNITS, replace=False)] = False
    return np.asarray(present)


def _draw_actions(present: NDArray[np.bool_], gain: NDArray[np.float64], rng: Generator) -> list[Action]:
    """Intensity and side of each AU that shows; from slight (0.32) to extreme (1)."""
    actions = []
    for column in np.flatnonzero(present):
        action_unit = prototypes().action_units[column]
        intensity = 0.48 + 0.47 * rng.beta(2.4, 2.0)
        side = ""
        if rng.random() < _SIDED_RATES.get(action_unit, 0.0):
            side = "L" if rng.random() < _LEFT_SHARE else "R"
        lip = rng.random()
        if lip < _TOP_RATES.get(action_unit, 0.0):
            side = "T"
        elif lip > 1.0 - _BOTTOM_RATES.get(action_unit, 0.0):
            side = "B"
        actions.append(Action(action_unit, float(np.clip(intensity * gain[column] ** 1.8, 0.32, 1.0)), side))
    return actions


def _draw_traces(present: NDArray[np.bool_], affinity: NDArray[np.float64], rng: Generator) -> list[Action]:
    """Hints, too faint to be coded, of AUs that belong to the emotions felt but do not show; never an open mouth."""
    hints = affinity * rng.uniform(0.4, 1.0, len(affinity)) * _TRACE_MAX
    return [
        Action(action_unit, float(min(hint, _TRACE_MAX)))
        for action_unit, hint, shows in zip(prototypes().action_units, hints, present, strict=True)
        if not shows and hint > 0.04 and action_unit not in (16, 22, 25, 26, 27, 28, 43)
    ]


def _code(actions: list[Action], odd_name: str | None, rng: Generator) -> tuple[str, ...]:
    """The AU tokens of one expert, ascending, with a few missed and a few imagined."""
    table = prototypes()
    rates = table.target_rates
    coded = {action.action_unit: action.token for action in actions if rng.random() >= _MISS_RATE}
    imagined = rng.random(len(rates)) < _MISS_RATE * rates / (1.0 - rates)
    for column in np.flatnonzero(imagined)[: max(0, _MAX_ACTION_UNITS - len(coded))]:
        coded.setdefault(table.action_units[column], str(table.action_units[column]))
    if odd_name is not None:
        coded[ODD_ACTIONS[odd_name].action_unit] = odd_name
    return tuple(coded[action_unit] for action_unit in sorted(coded))


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
    with new_folder(root) as scratch:
        images = scratch / "aligned"
        images.mkdir()
        rows = _draw_all(tasks, images, seed, processes or os.cpu_count() or 1, progress)
        _write_labels(scratch, plan, tasks, rows)
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
