"""Images per second of training: what the store, the epoch loop and Ray Train cost beside the bare computation.

Arms, each in processes of its own, worked in turn (one computes, the others sleep), several windows each:
  bare       forward, backward, clipping and update on one fixed batch
  loop       rafce_ray's epoch loop on the store, without Ray
  ray        the same through Ray Train
  classical  torch Dataset + DataLoader that decode and augment JPEG files per sample
  ddp        rafce_ray's epoch loop on 2 gloo workers, without Ray
  ddp_ray    the same through Ray Train

All sides have the same number of threads and the niceness of Ray's workers (15).

  python benchmarks/train.py                     all arms
  python benchmarks/train.py --without-ray       bare, loop, classical; on the GPU where there is one
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from rafce_drawing.labelled import synthesize
from rafce_ray.base.console import progress_bar
from rafce_ray.base.hardware import choose_device, describe_hardware, describe_software
from rafce_ray.config import load_config
from rafce_ray.data.loader import Batch, prepare
from rafce_ray.run.loop import autocast, train_epoch
from rafce_ray.run.state import NUM_LOSS_SUMS, Job, LocalSession, Training

NICENESS_OF_RAY_WORKERS = 15
POLL_S = 0.005
GOALS = {"loop/bare": 0.95, "ray/loop": 0.95, "loop/classical": 1.15, "ddp_ray/ddp": 0.95}


@dataclass(frozen=True)
class Plan:
    """What every arm needs, as plain values: it travels to other processes."""

    job: dict[str, Any]
    folder: str
    windows: int
    threads: int
    device: str

    def signal(self, kind: str, arm: str, window: int) -> Path:
        """The file by which a window is started ("go") or its figure told ("done")."""
        return Path(self.folder) / f"{kind}.{arm}.{window}"


def serve_windows(plan: Plan, arm: str, rank: int, measure: Any) -> None:
    """Wait for each window's start, measure it, tell the figure (rank 0); window 0 warms up."""
    for window in range(plan.windows + 1):
        while not plan.signal("go", arm, window).exists():
            time.sleep(POLL_S)
        images_per_s = measure()
        if rank == 0:
            beside = plan.signal("writing", arm, window)
            beside.write_text(json.dumps(images_per_s))
            beside.rename(plan.signal("done", arm, window))


def set_up(threads: int) -> None:
    """The same conditions for every arm."""
    torch.set_num_threads(threads)
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS_OF_RAY_WORKERS)


def epoch_rate(training: Training, wrapped: nn.Module) -> float:
    """One epoch of rafce_ray's own loop: images/s by the wall clock over all workers."""
    start = time.perf_counter()
    train_epoch(training, wrapped)
    elapsed = time.perf_counter() - start
    training.progress.epoch += 1
    training.progress.step, training.progress.loss_sums = 0, [0.0] * NUM_LOSS_SUMS
    return len(training.splits.train) / elapsed


def train_step(training: Training, batch: Batch) -> None:
    """Forward, backward, clipping, update: what every arm does with a batch."""
    with autocast(training):
        losses, _ = training.objective(batch, 1.0)
    training.optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    nn.utils.clip_grad_norm_(training.objective.parameters(), training.config.optim.grad_clip)
    training.optimizer.step()


def run_loop(plan: Plan) -> None:
    set_up(plan.threads)
    training = Training(Job.from_plain(plan.job), LocalSession(plan.device))
    serve_windows(plan, "loop", 0, lambda: epoch_rate(training, training.objective))


def run_bare(plan: Plan) -> None:
    set_up(plan.threads)
    training = Training(Job.from_plain(plan.job), LocalSession(plan.device))
    training.objective.train()
    batch = training.prepare(next(iter(training.loader.batches(0))))
    steps = training.loader.steps_per_epoch

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            train_step(training, batch)
        if plan.device == "cuda":
            torch.cuda.synchronize()
        return steps * len(batch.images) / (time.perf_counter() - start)

    serve_windows(plan, "bare", 0, measure)


class JpegFaces(torch.utils.data.Dataset):
    """The classical way: open, decode and augment one file at a time."""

    def __init__(self, training: Training) -> None:
        from torchvision.transforms import v2

        aligned = Path(str(training.config.data.root)) / "aligned"
        targets, rows = training.dataset.targets, training.splits.train
        self._files = [aligned / f"{Path(training.dataset.names[row]).stem}_aligned.jpg" for row in rows]
        self._targets = [(int(targets.emotion[row]), targets.action_units[row]) for row in rows]
        px = training.preprocessing.image_px
        self._transform = v2.Compose(
            [
                v2.PILToTensor(),
                v2.RandomHorizontalFlip(),
                v2.RandomAffine(10, translate=(0.05, 0.05), scale=(0.9, 1.1)),
                v2.Resize((px, px), antialias=True),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(training.preprocessing.mean, training.preprocessing.std),
            ]
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, torch.Tensor]:
        from PIL import Image

        with Image.open(self._files[index]) as image:
            pixels = self._transform(image.convert("RGB"))
        emotion, action_units = self._targets[index]
        return pixels, emotion, torch.from_numpy(action_units)


def run_classical(plan: Plan) -> None:
    set_up(plan.threads)
    training = Training(Job.from_plain(plan.job), LocalSession(plan.device))
    training.objective.train()
    loader = DataLoader(
        JpegFaces(training),
        batch_size=training.config.optim.batch_size,
        shuffle=True,
        num_workers=min(8, os.cpu_count() or 1),
        persistent_workers=True,
        pin_memory=plan.device == "cuda",
        # A process that uses a GPU must not be forked.
        multiprocessing_context="spawn" if plan.device == "cuda" else None,
    )
    votes = torch.full((1, 6), float("nan"))

    def measure() -> float:
        start = time.perf_counter()
        for images, emotion, action_units in loader:
            images, emotion, action_units = (
                one.to(plan.device, non_blocking=True) for one in (images, emotion, action_units)
            )
            known = (~action_units.isnan()).sum().float()
            batch = Batch(
                images=training.in_memory_format(images),
                emotion=emotion,
                action_units=action_units,
                votes=votes.expand(len(images), -1).to(plan.device),
                emotion_norm=(emotion >= 0).sum().float(),
                au_norm=known,
                votes_norm=torch.zeros((), device=plan.device),
                rows=np.zeros(0, np.int64),
            )
            train_step(training, batch)
        if plan.device == "cuda":
            torch.cuda.synchronize()
        return len(training.splits.train) / (time.perf_counter() - start)

    serve_windows(plan, "classical", 0, measure)


class GlooSession(LocalSession):
    """Two processes and torch.distributed: DDP without Ray."""

    def __init__(self, rank: int, num_workers: int) -> None:
        super().__init__()
        self.rank, self.num_workers = rank, num_workers

    def wrap(self, module: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        total = values.detach().clone()
        torch.distributed.all_reduce(total)
        return total

    def share_buffers(self, module: nn.Module) -> None:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)


def run_ddp_rank(plan: Plan, rank: int) -> None:
    set_up(max(1, plan.threads // 2))
    store = f"file://{plan.folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    session = GlooSession(rank, 2)
    training = Training(Job.from_plain(plan.job), session)
    wrapped = session.wrap(training.objective)
    serve_windows(plan, "ddp", rank, lambda: epoch_rate(training, wrapped))
    torch.distributed.destroy_process_group()


def ray_worker(values: dict[str, Any]) -> None:
    """Ray Train's worker function: the same epochs, each followed by a report as in a real run."""
    from rafce_ray.train.worker import TrainSession

    plan = Plan(**values["plan"])
    session = TrainSession(Job.from_plain(plan.job))
    training = Training(Job.from_plain(plan.job), session)
    wrapped = session.wrap(training.objective)

    def measure() -> float:
        rate = epoch_rate(training, wrapped)
        session.report({"images_per_s": rate})
        return rate

    serve_windows(plan, values["arm"], session.rank, measure)
    session.stop_watching()


def start_ray_arm(plan: Plan, arm: str, num_workers: int) -> threading.Thread:
    from ray.train import LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        ray_worker,
        train_loop_config={"plan": plan.__dict__, "arm": arm},
        scaling_config=ScalingConfig(
            num_workers=num_workers, resources_per_worker={"CPU": max(1, plan.threads // num_workers)}
        ),
        run_config=RunConfig(
            name=arm, storage_path=f"{plan.folder}/ray", logging_config=LoggingConfig(log_level="ERROR")
        ),
    )
    thread = threading.Thread(target=trainer.fit, name=arm)
    thread.start()
    return thread


def measure_in_turn(plan: Plan, arms: list[str]) -> dict[str, list[float]]:
    """Start each arm's windows in turn; the first window of each is a warm-up and not counted."""
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    with progress_bar("windows", (plan.windows + 1) * len(arms)) as advance:
        for window in range(plan.windows + 1):
            for arm in arms:
                plan.signal("go", arm, window).touch()
                done = plan.signal("done", arm, window)
                while not done.exists():
                    time.sleep(POLL_S)
                if window:
                    rates[arm].append(json.loads(done.read_text()))
                advance(1)
    return rates


def show(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Print medians and the medians of the ratios within each round of windows."""
    console = Console()
    table = Table("arm", "images/s (median)", "lowest", "highest", title="training throughput")
    for arm, values in rates.items():
        table.add_row(arm, f"{statistics.median(values):.1f}", f"{min(values):.1f}", f"{max(values):.1f}")
    console.print(table)
    ratios = {}
    for name, goal in GOALS.items():
        over, under = name.split("/")
        if over in rates and under in rates:
            ratios[name] = statistics.median(one / other for one, other in zip(rates[over], rates[under], strict=True))
            console.print(f"{name}: {ratios[name]:.3f} (goal {goal})")
    return {"images_per_s": rates, "ratios": ratios}


def make_plan(arguments: argparse.Namespace, folder: str) -> Plan:
    # The drawn set has 2,709 of 4,549 images in its train split.
    faces = synthesize(Path(folder) / "faces", num_images=round(arguments.images * 4549 / 2709)).root
    device = choose_device().type if arguments.without_ray else "cpu"
    config = load_config(
        overrides=[
            f"data.root={faces}",
            f"data.store_dir={folder}/stores",
            f"model.backbone={arguments.backbone}",
            "model.weights=none",
            f"model.image_px={arguments.image_px}",
            f"optim.batch_size={arguments.batch_size}",
            "optim.epochs=10000",
            f"run.precision={arguments.precision}",
        ]
    )
    prepared = prepare(config.data)
    job = Job(config, prepared.store_uri, prepared.taxonomy, f"{folder}/run", {})
    return Plan(job.to_plain(), folder, arguments.windows, arguments.threads, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="train images, all of which a window goes through once")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-px", type=int, default=112)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--without-ray", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args()
    targets = {"bare": [run_bare], "loop": [run_loop], "classical": [run_classical]}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        plan = make_plan(arguments, folder)
        spawn = multiprocessing.get_context("spawn")
        processes = [
            spawn.Process(target=function, args=(plan,)) for functions in targets.values() for function in functions
        ]
        arms, threads = list(targets), []
        if not arguments.without_ray:
            import ray

            processes += [spawn.Process(target=run_ddp_rank, args=(plan, rank)) for rank in (0, 1)]
            ray.init(address="local", num_cpus=2 * plan.threads, log_to_driver=False, logging_level="ERROR")
            threads = [start_ray_arm(plan, "ray", 1), start_ray_arm(plan, "ddp_ray", 2)]
            arms += ["ray", "ddp", "ddp_ray"]
        for process in processes:
            process.start()
        rates = measure_in_turn(plan, arms)
        for waited in [*processes, *threads]:
            waited.join()
    record = show(rates) | {
        "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
        "hardware": describe_hardware(torch.device(plan.device)),
        "software": describe_software(),
    }
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
