import io
import json
import logging
import sys
import time
from collections.abc import Iterator

import pytest

from rafce_ray.service import edge
from rafce_ray.service.edge import LOGGER, JsonLines, log_as_json


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    logger = logging.getLogger(LOGGER)
    before = logger.handlers, logger.propagate, logger.level
    stream = io.StringIO()
    log_as_json(io.StringIO())
    log_as_json(stream)
    yield stream
    for handler in logger.handlers:
        handler.close()
    logger.handlers, logger.propagate, logger.level = before


def test_each_record_is_one_json_object(stream):
    logging.getLogger(f"{LOGGER}.edge").info("two\nlines", extra={"fields": {"number": 3, "text": 'a"b\n'}})
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record.pop("time").endswith("+00:00")
    assert record == {
        "level": "info",
        "logger": "rafce_ray.service.edge",
        "event": "two\nlines",
        "number": 3,
        "text": 'a"b\n',
    }


def test_an_exception_keeps_its_frames_and_the_start_of_its_message():
    # Formatted alone: pytest would keep the message, half a surrogate in it, and its workers cannot send that.
    try:
        raise ValueError(chr(0xD800) + "A" * 100_000)
    except ValueError:
        record = logging.LogRecord(LOGGER, logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    line = JsonLines().format(record)
    told = json.loads(line)
    assert told["exception"] == "ValueError"
    assert told["message"] == r"\ud800" + "A" * 199
    assert len(told["frames"]) == 1
    assert "test_logs.py" in told["frames"][0]
    assert len(line) < 1000


@pytest.mark.usefixtures("stream")
def test_a_file_takes_everything_and_the_stream_warnings_alone(tmp_path):
    shown = io.StringIO()
    log_as_json(shown, tmp_path / "service.log")
    logger = logging.getLogger(LOGGER)
    logger.info("request", extra={"fields": {"status": 200}})
    logger.warning("slow")
    logger.debug("detail")
    written = [json.loads(line) for line in (tmp_path / "service.log").read_text().splitlines()]
    assert [(line["event"], line["level"]) for line in written] == [("request", "info"), ("slow", "warning")]
    assert written[0]["status"] == 200
    assert [json.loads(line)["event"] for line in shown.getvalue().splitlines()] == ["slow"]


@pytest.mark.usefixtures("stream")
def test_a_full_file_is_kept_beside_and_no_line_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(edge, "MAX_FILE_BYTES", 1000)
    log_as_json(io.StringIO(), tmp_path / "service.log")
    for number in range(20):
        logging.getLogger(LOGGER).info("request", extra={"fields": {"number": number}})
    log_as_json(io.StringIO())
    kept = sorted(tmp_path.iterdir(), reverse=True)
    assert len(kept) > 1
    assert all(path.stat().st_size < 1200 for path in kept)
    numbers = [json.loads(line)["number"] for path in kept for line in path.read_text().splitlines()]
    assert numbers == list(range(20))


@pytest.mark.usefixtures("stream")
def test_lines_that_come_fast_are_written_together_and_none_waits_for_the_next(tmp_path, monkeypatch):
    file = tmp_path / "service.log"

    def events() -> list[str]:
        return [json.loads(line)["event"] for line in file.read_text().splitlines()]

    logger = logging.getLogger(LOGGER)
    monkeypatch.setattr(edge, "FLUSH_S", 600)
    log_as_json(io.StringIO(), file)
    for event in ("alone", "fast", "faster"):
        logger.info(event)
    assert events() == ["alone"]
    logger.warning("slow")
    assert events() == ["alone", "fast", "faster", "slow"]

    monkeypatch.setattr(edge, "FLUSH_S", 0.5)
    log_as_json(io.StringIO(), file)
    logger.info("earlier")
    time.sleep(1.6)
    logger.info("alone")
    assert events()[-1] == "alone"
    logger.info("last")
    deadline = time.monotonic() + 30
    while events()[-1] != "last" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert events()[-3:] == ["earlier", "alone", "last"]
