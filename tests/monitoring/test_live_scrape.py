"""A run and trials on a live cluster, scraped as Prometheus does: every metric of dashboard and alerts is there, with
the loop's values.
"""

import json
import os
import signal
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import free_port

from rafce_ray.cli.monitor import main as monitor
from rafce_ray.config import load_config
from rafce_ray.data.loader import Readings, prepare
from rafce_ray.monitoring.compose import DISCOVERY_FILE
from rafce_ray.run.checkpoint import list_checkpoints
from rafce_ray.run.folder import RunFolder
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.plan import Shares
from rafce_ray.study.trials import Training
from rafce_ray.train.launch import launch

pytestmark = pytest.mark.ray

SCRAPE_S = 0.25
EPOCHS, LONGER = 12, 36
"""Of the run and the first trial, and of the second trial, which goes on while the first one's figures go."""
DEADLINE_S = 120


class Seen(NamedTuple):
    """One sample of one scrape; ``scrape``: its number."""

    scrape: int
    at: float
    labels: dict[str, str]
    value: float


class Scraper:
    """Asks every node's metrics port again and again, and keeps what it sees of ours."""

    def __init__(self) -> None:
        import ray

        self.seen: dict[str, list[Seen]] = defaultdict(list)
        self.urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in ray.nodes()]
        self.scrapes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> "Scraper":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def of(self, name: str, /, **labels: str) -> list[Seen]:
        return [one for one in list(self.seen[f"ray_rafce_{name}"]) if one.labels.items() >= labels.items()]

    def values(self, name: str, /, **labels: str) -> set[float]:
        return {one.value for one in self.of(name, **labels)}

    def wait_for(self, condition: Callable[[], object], describe: Callable[[], object] = str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, f"it was never exported {describe()}"
            time.sleep(SCRAPE_S)

    def _run(self) -> None:
        while not self._stop.wait(SCRAPE_S):
            self.scrapes += 1
            for url in self.urls:
                with suppress(OSError):
                    text = self._opener.open(url, timeout=5).read().decode()
                    self._take(text)

    def _take(self, text: str) -> None:
        for family in text_string_to_metric_families("\n".join(one for one in text.splitlines() if "rafce" in one)):
            for sample in family.samples:
                self.seen[sample.name].append(Seen(self.scrapes, time.time(), sample.labels, sample.value))


@pytest.fixture(scope="module")
def scraper(ray_cluster_of_tests) -> Iterator[Scraper]:
    with Scraper() as scraper:
        yield scraper


@pytest.fixture(scope="module")
def overrides(tiny_overrides) -> list[str]:
    return [
        *tiny_overrides,
        f"optim.epochs={EPOCHS}",
        f"optim.patience={LONGER}",
        "optim.warmup_epochs=0",
        "run.cpus_per_worker=1",
        "run.max_failures=2",
    ]


@pytest.fixture(scope="module")
def run(scraper, overrides, tmp_path_factory) -> RunFolder:
    """A run of ``rafce train``, which was scraped while it trained."""
    place = tmp_path_factory.mktemp("runs")
    result = launch(load_config(overrides=[*overrides, f"run.storage={place}", "run.name=shown"]))
    return RunFolder(result["run_dir"])


@pytest.fixture(scope="module")
def study(scraper, overrides, tmp_path_factory) -> StudyFolder:
    """Two trials in turn, of which the first loses its newest checkpoint's content and its process."""
    from rafce_ray.tune.sweep import train_seeds
    from rafce_ray.tune.trials import Settings

    study = StudyFolder(str(tmp_path_factory.mktemp("studies") / "sweep"))
    trainings = []
    for name, epochs in (("first", EPOCHS), ("second", LONGER)):
        config = load_config(overrides=[*overrides, f"optim.epochs={epochs}"])
        trainings.append(Training(name, len(trainings), name, config, {}))
    harm = threading.Thread(target=spoil_and_kill, args=(study.trial("first"), scraper))
    harm.start()
    shares = Shares(workers=1, cpus=1.0, gpus=0.0, at_once=1, fitting=1)
    settings = Settings(shares, config.run.max_failures, limit=1)
    train_seeds(study, trainings, settings, Readings(prepare), "sweep")
    harm.join()
    return study


def spoil_and_kill(folder: RunFolder, scraper: Scraper) -> None:
    """Cut the newest checkpoint short and kill the process that wrote it, once the trial has been seen."""
    scraper.wait_for(lambda: scraper.of("train_epoch", run="sweep/first") and list_checkpoints(folder.checkpoints)[0])
    pid = next(event["pid"] for event in folder.events() if event["event"] == "started")
    os.kill(pid, signal.SIGSTOP)
    newest = list_checkpoints(folder.checkpoints)[0][-1]
    (newest.location.local / "trainer_state.pt").write_bytes(b"cut short")
    os.kill(pid, signal.SIGKILL)


def test_what_is_scraped_is_what_the_run_wrote_down(run, scraper):
    records = {record["epoch"]: record for record in run.metrics()}
    epochs = scraper.of("train_epoch", run="shown")
    assert len({one.value for one in epochs}) >= 2, "too few epochs were seen to compare"
    shown = {
        ("train_loss", "split", "train", "task", "total"): lambda record: record["train"]["loss"],
        ("train_loss", "split", "validation", "task", "emotion"): lambda record: record["validation"]["emotion_loss"],
        ("train_loss", "split", "validation", "task", "action_units"): lambda record: record["validation"]["au_loss"],
        ("train_metric", "split", "validation", "name", "score"): lambda record: record["validation"]["score"],
        ("train_gap", "name", "accuracy"): lambda record: record["gap"]["accuracy"],
        ("train_grad_norm", "task", "total"): lambda record: record["train"]["grad_norm"],
        ("train_grad_norm", "task", "emotion"): lambda record: record["gradient"]["emotion_norm"],
        ("train_grad_norm", "task", "action_units"): lambda record: record["gradient"]["au_norm"],
        ("train_gradient_cosine",): lambda record: record["gradient"]["cosine"],
        ("train_images_per_s",): lambda record: record["images_per_s"],
        ("train_data_wait_ratio",): lambda record: record["data_wait"],
        ("train_learning_rate",): lambda record: record["lr"],
    }
    for (name, *tags), figure in shown.items():
        labels = dict(zip(tags[::2], tags[1::2], strict=True))
        seen, wanted = scraper.values(name, run="shown", **labels), {figure(record) for record in records.values()}
        assert seen, name
        assert seen <= wanted, (name, labels)
    # Within one scrape the loss is that of the epoch, or of the next one where the export came between the two
    # settings.
    losses = {one.scrape: one.value for one in scraper.of("train_loss", run="shown", split="train", task="total")}
    pairs = [(losses[one.scrape], one.value) for one in epochs if one.scrape in losses]
    assert any(loss == records[epoch]["train"]["loss"] for loss, epoch in pairs)
    for loss, epoch in pairs:
        near = {records[other]["train"]["loss"] for other in (epoch - 1, epoch, epoch + 1) if other in records}
        assert loss in near, (epoch, loss)


def test_an_action_unit_without_positives_is_absent_and_never_zero(run, scraper):
    wanted = defaultdict(list)
    for record in run.metrics():
        for unit in record["validation"]["per_au"]:
            wanted[unit["action_unit"]].append(unit["f1"])
    undefined = {code for code, values in wanted.items() if set(values) == {None}}
    assert undefined, "this data has no action unit without positives to look at"
    assert {one.labels["au"] for one in scraper.of("train_au_f1", run="shown")} == set(wanted) - undefined
    for code, values in wanted.items():
        assert scraper.values("train_au_f1", run="shown", au=code) <= set(values), code


def test_checkpoints_steps_and_the_waiting_command_are_shown(run, scraper):
    kept = list_checkpoints(run.checkpoints)[0][-1]
    files = [path for path in kept.location.local.rglob("*") if path.is_file()]
    # Its JSON files differ by some digits from epoch to epoch.
    size = pytest.approx(sum(path.stat().st_size for path in files), rel=1e-3)
    assert all(value == size for value in scraper.values("train_checkpoint_bytes", run="shown"))
    assert all(value > 0 for value in scraper.values("train_checkpoint_seconds", run="shown"))
    assert scraper.values("train_max_epochs", run="shown") == {float(EPOCHS)}
    steps = scraper.of("train_last_step_timestamp_seconds", run="shown")
    # Events are dated to the millisecond.
    began = run.events()[0]["time"] - 0.001
    assert all(began <= one.value <= one.at for one in steps), (began, steps)
    assert len({one.value for one in steps}) > 2
    assert scraper.values("train_command_running", run="shown") == {1.0}


def test_a_run_that_has_ended_is_no_longer_shown(run, scraper):
    def gone() -> bool:
        last = max(one.scrape for one in scraper.of("train_epoch", run="shown"))
        return scraper.scrapes - last > 4

    scraper.wait_for(gone)


def test_a_lost_process_and_a_broken_checkpoint_are_counted_once_each(study, scraper):
    folder = study.trial("first")
    kinds = [event["event"] for event in folder.events()]
    assert (kinds.count("started"), kinds.count("invalid_checkpoint")) == (2, 1)
    scraper.wait_for(lambda: scraper.values("train_restarts_total", run="sweep/first") == {1.0})
    assert scraper.values("train_invalid_checkpoints_total", run="sweep/first") == {1.0}
    assert scraper.values("tune_trial_restarts_total", study="sweep") == {1.0}
    assert scraper.of("train_restarts_total", run="sweep/second") == []


def test_a_study_shows_its_trials_and_the_best_figure_of_them(study, scraper):
    metric = study.trial("first").config().optim.monitor
    figures = [r["validation"][metric] for name in ("first", "second") for r in study.trial(name).metrics()]
    best = scraper.values("tune_best_score", study="sweep", metric=metric)
    assert best
    assert best <= set(figures)
    assert scraper.values("tune_trials", study="sweep", role="sweep", state="failed") == {0.0}
    assert scraper.values("tune_trials", study="sweep", role="sweep", state="running") >= {1.0}
    assert 1.0 in scraper.values("tune_trials", study="sweep", role="sweep", state="finished")
    scraper.wait_for(lambda: 2.0 in scraper.values("tune_trial_seconds_count", study="sweep"))


def test_a_process_that_is_used_again_does_not_show_its_earlier_trial(study, scraper):
    first, second = (scraper.of("train_epoch", run=f"sweep/{name}") for name in ("first", "second"))
    assert {one.labels["WorkerId"] for one in second} <= {one.labels["WorkerId"] for one in first}, "not used again"
    # Ray exports once a second: the first one's figures may be there for a while. They must go before the process does.
    assert max(one.scrape for one in first) < max(one.scrape for one in second)


def test_every_metric_of_the_dashboard_and_the_alerts_is_exported(run, study, scraper, expressions, metric_names):
    used = set().union(*(metric_names(expression) for expression in expressions))
    assert len(used) > 20
    assert {name for name in used if not scraper.seen.get(name)} == set()


@pytest.mark.needs("prometheus")
def test_prometheus_itself_follows_the_cluster_and_takes_the_alert_rules(study, scraper, rules, tmp_path):
    port = free_port()
    folder = Path(os.environ["RAY_TMPDIR"]) / "ray"
    scraper.wait_for((folder / DISCOVERY_FILE).exists)
    assert monitor(["--ray-folder", str(folder), "--write", str(tmp_path)]) == 0
    said = tmp_path / "said"
    with said.open("w") as stderr:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={tmp_path}/prometheus/prometheus.yml",
                f"--storage.tsdb.path={tmp_path}/data/prometheus",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stderr=stderr,
        )

    def ask(path: str) -> dict:
        with scraper._opener.open(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=5) as answer:
            return json.loads(answer.read())["data"]

    def scraped() -> bool:
        assert process.poll() is None
        with suppress(OSError):
            query = urllib.parse.urlencode({"query": "ray_rafce_tune_trial_restarts_total and on (instance) up == 1"})
            return bool(ask(f"query?{query}")["result"])
        return False

    try:
        scraper.wait_for(scraped, said.read_text)
        known = {rule["name"]: rule for group in ask("rules")["groups"] for rule in group["rules"]}
        assert known.keys() >= {rule["alert"] for rule in rules}
        assert {name for name, rule in known.items() if rule["health"] == "err"} == set()
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
    assert code == 0
