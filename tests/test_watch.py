import pytest

from rafce_ray.config import load_config
from rafce_ray.run.folder import RunFolder
from rafce_ray.run.watch import RunWatch, duration, epoch_line


def record(epoch: int, accuracy: float | None = 0.5) -> dict:
    return {
        "epoch": epoch,
        "best_epoch": epoch,
        "train": {"emotion_loss": 1.25, "au_loss": 0.3},
        "validation": {"accuracy": accuracy, "macro_f1": 0.4, "au_f1_mean": None},
        "gap": {"accuracy": 0.1},
        "images_per_s": 100.4,
        "elapsed_s": 30.0 * epoch,
    }


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.4, "1:15"), (3600, "1:00:00"), (59.6, "1:00")])
def test_durations_read_as_clocks_do(seconds, text):
    assert duration(seconds) == text


def test_a_line_tells_the_epoch_its_figures_and_the_time_left():
    line = epoch_line(record(2), epochs=10)
    assert line.startswith("epoch 2/10")
    assert "emotion loss 1.2500" in line
    assert "AU-F1 -" in line
    assert "at most 4:00 left *" in line


def test_a_watched_run_shows_each_epoch_and_event_once_and_not_those_from_before(tmp_path, capsys):
    folder = RunFolder(str(tmp_path / "run"))
    folder.add_event("started", message="an earlier start")
    folder.write_metrics([record(1)])
    with RunWatch(folder, load_config()) as watch:
        folder.write_metrics([record(1), record(2)])
        folder.add_event("warning", message="mind the gap")
        watch._update()
        folder.write_metrics([record(1), record(2), record(3)])
    shown = capsys.readouterr().err
    assert [shown.count(f"epoch {epoch}/50") for epoch in (1, 2, 3)] == [0, 1, 1]
    assert shown.count("warning: mind the gap") == 1
    assert "an earlier start" not in shown


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    folder.write_metrics([record(1)])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"epoch": 2, "tr')
    assert [one["epoch"] for one in folder.metrics()] == [1]
