"""Trials on a real cluster: what a stopped one leaves behind, and what it gives back."""

import pytest
from processes import is_alive

from rafce_ray.config import config_hash, load_config
from rafce_ray.data.loader import prepare
from rafce_ray.run.state import Job
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import TrialPlan, read_trial

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_trial_gives_back_what_it_held(workers, tiny_overrides, tmp_path, ray_cluster_of_tests, until):
    import ray

    from rafce_ray.study.plan import share_out
    from rafce_ray.tune.scheduler import Control, Course, Unscheduled
    from rafce_ray.tune.trials import Settings, cluster_nodes, run_on_tune

    class StopsAfterTwo(Unscheduled):
        def judge(self, name, epoch, score):
            return "two epochs are enough" if epoch >= 2 else None

    study = StudyFolder(str(tmp_path / "study"))
    settled = ("optim.epochs=200", "optim.warmup_epochs=0", "run.name=long", f"run.storage={study.trials}")
    shape = (f"run.num_workers={workers}", "run.cpus_per_worker=1")
    config = load_config(overrides=[*tiny_overrides, *settled, *shape])
    prepared = prepare(config.data)
    folder = study.trial("long")
    job = Job(config, prepared.store_uri, prepared.taxonomy, folder.place, {})
    plan = TrialPlan("long", 0, "sweep", {}, config_hash(config), float(workers), 0.0)
    plan.write(study, job)
    folder.start(config, {}, {})
    total = ray.cluster_resources()["CPU"]

    shares = share_out(config.run, cluster_nodes(), concurrent=1, gpus_per_worker=None)
    scheduler = StopsAfterTwo(Course(study, "macro_f1", 200, Control()))
    run_on_tune([plan], scheduler, Settings(shares, max_failures=0, limit=1))

    pids = [event["pid"] for event in folder.events() if event["event"] == "started"]
    until(
        lambda: ray.available_resources().get("CPU", 0) >= total and not any(map(is_alive, pids)),
        lambda: (ray.available_resources(), pids),
    )
    trial = read_trial(folder, "macro_f1")
    assert (trial.status, trial.reason) == ("stopped_by_scheduler", "two epochs are enough")
    assert len(pids) == 1
    # A nested trial's workers train on until they are gone.
    assert trial.epochs == 2 if workers == 1 else 2 <= trial.epochs < 200
    assert not folder.bundle.exists()
    assert len(folder.checkpoints.list()) >= 1
