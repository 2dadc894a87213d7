"""Ctrl-C or SIGTERM at every stage of the demo."""

import signal
import time

import pytest

from tests.interrupted import interrupt_demo

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


class After:
    """True so many seconds after it was first asked."""

    def __init__(self, seconds):
        self._seconds, self._first = seconds, None

    def __call__(self, _record):
        self._first = self._first or time.monotonic()
        return time.monotonic() - self._first > self._seconds


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0])
def test_ctrl_c_after_some_seconds_leaves_no_process(tmp_path, seconds):
    interrupt_demo(tmp_path, After(seconds))


STAGES = {
    "the record is written": lambda record: record is not None,
    "Ray is started": lambda record: record is not None and record.ray_pid is not None,
    "the actors are asked for": lambda record: record is not None and record.actors,
    "the shards have answered": lambda record: record is not None and record.shards,
}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
def test_ctrl_c_at_a_stage_of_starting_leaves_no_process(tmp_path, stage):
    interrupt_demo(tmp_path, stage)


def test_ctrl_c_once_the_text_is_encoded_leaves_no_process(tmp_path):
    interrupt_demo(tmp_path, lambda _record: any(tmp_path.rglob("corpus-*")))


@pytest.mark.parametrize("seconds", [1.0, 3.0, 5.0, 15.0])
def test_sigterm_after_some_seconds_leaves_no_process(tmp_path, seconds):
    interrupt_demo(tmp_path, After(seconds), signal.SIGTERM)
