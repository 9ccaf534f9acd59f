"""`quantkit bench kernels`: its table, its JSON, and what it refuses before measuring."""

import json

import pytest
import torch

from quantkit.bench.ceilings import Ceilings
from quantkit.cli.main import run

SMALL = ["--shape", "64,128", "--rows", "1,32", "--families", "w8a16"]


@pytest.fixture
def quick(monkeypatch):
    """A CPU whose ceilings are known, and whose caches need no defeating."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        "quantkit.bench.kernels.measure_ceilings", lambda device: Ceilings(0.02, 0.03, 0.1, None, None)
    )
    monkeypatch.setattr("quantkit.bench.kernels.num_copies", lambda size, device: 1)


def test_the_table_says_what_it_is_of(quick, capsys):
    assert run(["bench", "kernels", *SMALL]) == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines() == ["no GPU: these are the kernels of the CPU", "ceilings", "bf16", "w8a16"]
    assert "read 20 GB/s, copy 30 GB/s, bf16 100 GFLOP/s" in shown.out
    for word in ("int8pack", "dequantize", "over bf16"):
        assert word in shown.out


def test_several_shapes_have_a_column_each(quick, capsys):
    assert run(["bench", "kernels", *SMALL, "--shape", "32,128"]) == 0
    assert "64x128" in (out := capsys.readouterr().out)
    assert "32x128" in out


def test_a_route_that_does_not_take_a_shape_is_named_instead_of_measured(quick, capsys):
    assert run(["bench", "kernels", "--shape", "33,77", "--rows", "1", "--families", "w4a16"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "w4a16 int4pack: not measured, needs weights of other columns than 33x77" in out
    assert "w4a16 1 dequantize *" in out


def test_json(quick, capsys):
    assert run(["bench", "kernels", *SMALL, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ceilings"]["read"] == 0.02
    assert {(t["family"], t["route"]) for t in report["timings"]} == {
        ("bf16", "dense"),
        ("w8a16", "int8pack"),
        ("w8a16", "dequantize"),
    }


@pytest.mark.parametrize(
    ("options", "problem", "fix"),
    [
        (["--shape", "9b"], "--shape 9b: no such layer, nor a shape", "use 8b, 70b or N,K"),
        (["--rows", "0"], "--rows 0: expected numbers from 1 on", "write them like 1,8,16"),
        (["--families", "w3a16"], "--families w3a16: no family 'w3a16' here", "use w4a16, w8a16"),
        (
            ["--write", "h100.json"],
            "--write h100.json: there is no GPU to measure routes on",
            "leave --write away",
        ),
    ],
)
def test_impossible_requests(options, problem, fix, quick, capsys):
    assert run(["bench", "kernels", *options]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[0] == f"error: {problem}"
    assert error[1].startswith(f"  fix: {fix}")


def test_a_table_needs_many_rows_and_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert run(["bench", "kernels", "--rows", "1,64", "--write", str(tmp_path / "t.json")]) == 2
    assert "with up to 64 rows: a table says what to do with any number" in capsys.readouterr().err
    assert run(["bench", "kernels", "--write", str(tmp_path / "none" / "t.json")]) == 2
    assert "none is no folder" in capsys.readouterr().err
