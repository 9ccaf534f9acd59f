"""Seconds belong to the innermost kind of work, and to no other."""

import time

import torch

from quantkit.calibration.stopwatch import Stopwatch


def test_inner_work_is_taken_from_outer_work(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 12.0, 12.0, 20.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    watch = Stopwatch(torch.device("cpu"))
    with watch.measure("forward"), watch.measure("observe"):  # 0 -> 1 forward, 1 -> 3 observe, 3 -> 7 forward
        pass
    with watch.measure("disk"):
        pass
    assert watch.take() == {"forward": 1.0 + 4.0, "observe": 2.0, "disk": 0.0}
