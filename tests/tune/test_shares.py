"""What fits on a cluster, counted by hand."""

import pytest

from rafce_ray.base.errors import UsageError
from rafce_ray.config import RunConfig, build_config
from rafce_ray.study.plan import NESTED_MEMORY_BYTES, Node, Shares, share_out


def run(**values) -> RunConfig:
    return build_config({"run": values}).run


def share(nodes, *, concurrent=None, gpus_per_worker=None, **values) -> Shares:
    return share_out(run(**values), nodes, concurrent=concurrent, gpus_per_worker=gpus_per_worker)


def test_a_worker_never_spans_two_machines():
    """2 machines of 3 CPUs hold 2 workers of 2 CPUs, although 6 CPUs would do for 3."""
    shares = share([Node(3, 0), Node(3, 0)], cpus_per_worker=2)
    assert (shares.fitting, shares.at_once, shares.cpus, shares.gpus) == (2, 2, 2.0, 0.0)
    assert share([Node(4, 0), Node(3, 0)], cpus_per_worker=2).fitting == 3
    assert share([Node(5, 0)]).fitting == 5, "one CPU where nothing else is said"


def test_a_trials_workers_may_lie_on_several_machines():
    """4 workers of 1 CPU: 3 + 3 slots hold one trial, 4 + 4 two, 4 + 3 one."""
    fitting = [share([Node(a, 0), Node(b, 0)], num_workers=4).fitting for a, b in ((3, 3), (4, 4), (4, 3))]
    assert fitting == [1, 2, 1]


@pytest.mark.parametrize(
    ("nodes", "gpus_per_worker", "fitting"),
    [
        ([Node(16, 2)], 0.25, 8),
        ([Node(8, 1), Node(8, 1)], 0.25, 8),
        ([Node(5, 2)], 0.25, 5),  # The CPUs are spent first.
        ([Node(16, 2)], 0.4, 4),  # 2 on each GPU: 0.8 of it; 5 x 0.4 = 2 would need a worker on two GPUs.
        ([Node(16, 3)], 1 / 3, 9),
        ([Node(16, 5)], 2, 2),
        ([Node(16, 3), Node(16, 3)], 2, 2),
    ],
)
def test_each_gpu_is_shared_for_itself(nodes, gpus_per_worker, fitting):
    shares = share(nodes, gpus_per_worker=gpus_per_worker)
    assert (shares.gpus, shares.fitting, shares.at_once) == (gpus_per_worker, fitting, fitting)


def test_a_whole_gpu_each_unless_more_trials_than_gpus_are_asked_for():
    nodes = [Node(16, 2)]
    assert (share(nodes).gpus, share(nodes).fitting) == (1.0, 2)
    assert share(nodes, concurrent=2).gpus == 1.0
    crowded = share(nodes, concurrent=3)
    assert (crowded.gpus, crowded.fitting, crowded.at_once) == (0.5, 4, 3)
    assert share(nodes, concurrent=5).gpus == pytest.approx(1 / 3)
    with pytest.raises(UsageError, match="3 trials at a time"):
        share(nodes, concurrent=3, num_workers=2)


def test_no_gpu_where_none_is_wanted():
    assert share([Node(4, 2)], use_gpu=False) == Shares(1, 1.0, 0.0, 4, 4)
    assert share([Node(4, 2)], gpus_per_worker=0) == Shares(1, 1.0, 0.0, 4, 4)
    assert share([Node(4, 0)]) == Shares(1, 1.0, 0.0, 4, 4)


@pytest.mark.parametrize("values", [{"use_gpu": True}, {"gpus_per_worker": 0.25}])
def test_a_gpu_that_is_asked_for_is_not_replaced_by_cpus(values):
    with pytest.raises(
        UsageError, match=r"\+ (1|0\.25) GPU; the cluster has 4 CPUs and 0 GPUs on 1 machine, with room for 0"
    ):
        share([Node(4, 0)], **values)


def test_contradictory_words_on_gpus_are_refused():
    with pytest.raises(UsageError, match=r"base\.run\.use_gpu=false and resources\.gpus_per_worker=0\.5 contradict"):
        share([Node(4, 2)], use_gpu=False, gpus_per_worker=0.5)
    with pytest.raises(UsageError, match=r"base\.run\.use_gpu=true and resources\.gpus_per_worker=0 contradict"):
        share([Node(4, 2)], use_gpu=True, gpus_per_worker=0)
    assert share([Node(4, 2)], use_gpu=False, gpus_per_worker=0).gpus == 0
    assert share([Node(4, 2)], use_gpu=True, gpus_per_worker=0.5).fitting == 4


def test_what_a_trial_can_never_have_is_refused_with_the_arithmetic():
    with pytest.raises(UsageError) as caught:
        share([Node(3, 0), Node(3, 0)], num_workers=2, cpus_per_worker=4)
    assert str(caught.value).startswith(
        "a trial wants 2 workers x 4 CPU; the cluster has 6 CPUs and 0 GPUs on 2 machines, with room for "
        "0 such workers."
    )
    with pytest.raises(UsageError) as caught:
        share([Node(3, 0), Node(3, 0)], num_workers=2, cpus_per_worker=2, concurrent=2)
    assert str(caught.value).startswith(
        "2 trials at a time x 2 workers x 2 CPU = 4 workers; the cluster has 6 CPUs and 0 GPUs on 2 machines, "
        "with room for 2 such workers."
    )


def test_fewer_trials_at_a_time_than_fit_are_what_was_asked_for():
    shares = share([Node(8, 0)], cpus_per_worker=2, concurrent=3)
    assert (shares.at_once, shares.fitting) == (3, 4)
    assert shares.shown == "3 at a time, each 1 worker with 2 CPU"


def test_what_tune_reserves():
    assert share([Node(8, 0)], cpus_per_worker=2).reserved == {"cpu": 2.0}
    assert share([Node(8, 2)], gpus_per_worker=0.5).reserved == {"cpu": 1.0, "gpu": 0.5}
    # Ray Train reserves the workers' share: reserved twice, a trial would wait for itself.
    assert share([Node(8, 2)], num_workers=2).reserved == {"cpu": 0, "memory": NESTED_MEMORY_BYTES}
