"""The stage: parts are whole or absent, whatever the instant of a kill."""

import os
from pathlib import Path

import pytest
import torch

from quantkit.formats.stage import STAGE_NAME, Stage

TENSORS = {
    "model.layers.0.a.weight_packed": torch.arange(6, dtype=torch.int32).reshape(2, 3),
    "model.layers.0.a.weight_scale": torch.tensor([[-0.5], [2.0]], dtype=torch.bfloat16),
    "model.layers.0.b.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).T,
}
NOTES = {"linears": {"model.layers.0.a": {"loss": 0.25}}, "excluded": 0}


class Killed(BaseException):
    """What a kill looks like from inside."""


def test_a_part_is_read_as_it_was_written(tmp_path):
    Stage(tmp_path).write("00000", TENSORS, NOTES)
    stage = Stage(tmp_path)
    assert stage.has("00000") and not stage.has("00001")
    read = stage.read("00000")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    assert stage.notes("00000") == NOTES
    assert stage.num_bytes > 0


def test_parts_can_be_dropped_and_the_stage_removed(tmp_path):
    stage = Stage(tmp_path)
    assert stage.parts() == [] and stage.num_bytes == 0
    for part in ("00001", "00000", "tuned"):
        stage.write(part, TENSORS, {})
    assert stage.parts() == ["00000", "00001", "tuned"]
    stage.drop("00001")
    stage.drop("never there")
    assert stage.parts() == ["00000", "tuned"]
    stage.remove()
    stage.remove()
    assert not (tmp_path / STAGE_NAME).exists()


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_killed_while_writing_it_has_the_part_or_not(tmp_path, monkeypatch, name):
    owner = os if name == "fsync" else Path
    real = getattr(owner, name)
    outcomes = set()
    for step in range(4):
        folder = tmp_path / str(step)
        folder.mkdir()
        calls = iter(range(100))

        def dying(*arguments, _calls=calls, _step=step):
            if next(_calls) == _step:
                raise Killed
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying)
            try:
                Stage(folder).write("00000", TENSORS, NOTES)
                outcomes.add("survived")
            except Killed:
                outcomes.add("killed")
        stage = Stage(folder)
        if stage.has("00000"):
            assert stage.notes("00000") == NOTES
            assert stage.read("00000").keys() == TENSORS.keys()
        stage.write("00000", TENSORS, NOTES)
        assert stage.parts() == ["00000"]
    assert outcomes == {"survived", "killed"}
