"""Reading ahead and writing behind: the same things in the same order, and no error lost."""

import threading

import pytest
import torch

from quantkit.calibration.overlap import ReadAhead, WriteBehind


@pytest.fixture(autouse=True)
def _memory_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("wanted", [[0, 1, 2, 3], [1, 3], [2, 2, 0]])
def test_every_layer_is_the_one_asked_for(wanted, is_ahead):
    reading = ReadAhead(lambda number: {"w": torch.tensor(number)}, 4, is_ahead=is_ahead)
    assert [int(reading.layer(number)["w"]) for number in wanted] == wanted


def test_the_next_layer_is_read_while_nobody_asks_and_none_behind_the_last():
    read, is_second = [], threading.Event()

    def layer(number):
        read.append(number)
        if number == 1:
            is_second.set()
        return {}

    reading = ReadAhead(layer, 2, is_ahead=True)
    reading.layer(0)
    assert is_second.wait(20)
    reading.layer(1)
    assert read == [0, 1]


def test_what_reading_raises_is_raised_to_who_asks():
    def layer(number):
        if number == 1:
            raise OSError("gone")
        return {}

    reading = ReadAhead(layer, 3, is_ahead=True)
    reading.layer(0)
    with pytest.raises(OSError, match="gone"):
        reading.layer(1)


@pytest.mark.parametrize("is_behind", [False, True])
def test_writes_keep_their_order(is_behind):
    written = []
    writing = WriteBehind(is_behind=is_behind)
    for number in range(20):
        writing.write(lambda number=number: written.append(number))
    writing.wait()
    assert written == list(range(20))


def test_a_write_that_failed_is_told_before_the_next_one():
    def fail():
        raise OSError("disk full")

    writing, written = WriteBehind(is_behind=True), []
    writing.write(fail)
    with pytest.raises(OSError, match="disk full"):
        writing.write(lambda: written.append(1))
    assert written == []
    writing.wait()
