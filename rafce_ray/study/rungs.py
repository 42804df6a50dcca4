"""The decisions of successive halving, one line each in ``rungs.jsonl``, in the order in which they were made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rafce_ray.base.console import to_json
from rafce_ray.study.folder import StudyFolder

RUNGS_FILE = "rungs.jsonl"


@dataclass(frozen=True)
class RungEntry:
    """One decision: ``score`` (higher is better) of a trial at the rung of epoch ``milestone``; ``cutoff`` of those there before it.

    ``cutoff`` is None for the first of a rung; ``action`` is ``continue`` or ``stop``.
    """

    trial: str
    bracket: int
    milestone: float
    epoch: int
    score: float
    cutoff: float | None
    action: str


def read_rungs(study: StudyFolder) -> list[RungEntry]:
    """All decisions so far; none where nothing was decided. DamagedFile where one cannot be read."""
    file, remedy = study.location / RUNGS_FILE, "The study's command then makes that decision again; all others stay."
    try:
        return [RungEntry(**record) for record in file.read_records(remedy)]
    except TypeError as error:
        raise file.damaged(error, "The study's command then makes all decisions again.") from None


def write_rungs(study: StudyFolder, entries: Sequence[RungEntry]) -> None:
    """Replace the file, whole or not at all."""
    (study.location / RUNGS_FILE).write_bytes("".join(to_json(asdict(one)) + "\n" for one in entries).encode())
