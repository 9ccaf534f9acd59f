"""What is measured, and what becomes of it: timings, their rates, and steps of a dispatch table."""

import json

import pytest
import torch

from quantkit.bench.ceilings import Ceilings
from quantkit.bench.contenders import baseline, contenders, family_names, random_input, random_weight
from quantkit.bench.dispatch_file import steps_from, update_table
from quantkit.bench.kernels import Timing, bench_kernels
from quantkit.bench.shapes import LAYERS, WeightShape, parse_names, parse_rows, parse_shapes
from quantkit.bench.timing import num_copies, time_chain
from quantkit.errors import BenchError
from quantkit_kernels.dispatch import Device
from quantkit_kernels.dispatch_table import read_table
from tests.unit.kernels.families import FAMILIES, FAMILY

CPU = torch.device("cpu")
SMALL = WeightShape("small", 64, 128)
H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 132)


def timing(rows, route, us, shape=SMALL, family="w4a16"):
    return Timing(family, route, rows, shape, us, 1.0, 1, 1.0)


def test_shapes():
    assert parse_shapes("8b") == LAYERS["8b"]
    assert parse_shapes("576,1536") == (WeightShape("576x1536", 576, 1536),)
    for text in ("9b", "0,4", "4096", "4096x4096"):
        with pytest.raises(BenchError, match=rf"--shape {text}.*\n.*8b, 70b or N,K"):
            parse_shapes(text)


def test_rows():
    assert parse_rows("16,1,8,8") == (1, 8, 16)
    for text in ("0", "1,", "-1", "1;2"):
        with pytest.raises(BenchError, match="--rows"):
            parse_rows(text)


def test_families_by_name():
    assert parse_names("b,a", ("a", "b", "c")) == ("a", "b")
    with pytest.raises(BenchError, match=r"no family 'd' here\n  fix: use a, b"):
        parse_names("a,d", ("a", "b"))


def test_bound_is_the_longer_of_moving_and_multiplying():
    ceilings = Ceilings(read=2.0, copy=2.0, bf16=100.0, fp8=200.0, int8=None)
    assert ceilings.seconds(4e12, 1e12, torch.bfloat16) == pytest.approx(2)
    assert ceilings.seconds(1e12, 1e15, torch.bfloat16) == pytest.approx(10)
    assert ceilings.seconds(1e12, 1e15, torch.float8_e4m3fn) == pytest.approx(5)
    assert ceilings.seconds(1e12, 1e15, torch.int8) == pytest.approx(10)  # no instructions of its own


def test_weights_and_inputs_are_random():
    weight = random_weight(4, torch.int8, (1, 32), 64, 128, CPU)
    assert weight.codes_NK.unique().tolist() == list(range(-8, 8))
    assert weight.scale_RG.shape == (64, 4)
    assert len(weight.scale_RG.unique()) > 50
    x, more = random_input(torch.int8, 3, 128, CPU)
    assert len(x.unique()) > 100
    assert more["x_scale"].shape == (3, 1)
    assert random_input(torch.bfloat16, 3, 128, CPU)[1] == {}


def test_every_weight_of_a_chain_is_read():
    read = []
    assert time_chain([lambda i=i: read.append(i) for i in range(3)], CPU) > 0
    assert read[:6] == [0, 1, 2, 0, 1, 2]
    assert num_copies(1, CPU) > num_copies(1 << 40, CPU) == 1


@pytest.mark.parametrize("name", family_names(CPU))
def test_kernels_of_a_cpu_compute_their_product(name):
    for contender in contenders(name, CPU):
        assert contender.routes or contender.missing
        for route in contender.routes:
            x, more = random_input(contender.input_dtype, 2, 128, CPU)
            y = route.run(x, contender.make(64, 128), **more)
            assert y.shape == (2, 64)
            assert y.dtype == torch.bfloat16


def test_the_baseline_is_the_product_in_bf16():
    contender = baseline(CPU)
    w, (x, _) = contender.make(64, 128), random_input(torch.bfloat16, 2, 128, CPU)
    assert torch.equal(contender.routes[0].run(x, w), torch.nn.functional.linear(x, w))


def test_a_report_has_every_route_and_number_of_rows(monkeypatch):
    monkeypatch.setattr(
        "quantkit.bench.kernels.measure_ceilings", lambda device: Ceilings(1.0, 1.0, 1.0, None, None)
    )
    monkeypatch.setattr("quantkit.bench.kernels.num_copies", lambda size, device: 1)
    begun = []
    report = bench_kernels(CPU, [SMALL], [1, 32], ["w8a16"], on_family=begun.append)
    found = [(t.family, t.num_rows, t.route) for t in report.timings]
    expected = [("bf16", 1, "dense"), ("bf16", 32, "dense")]
    expected += [("w8a16", 1, "int8pack"), ("w8a16", 1, "dequantize"), ("w8a16", 32, "dequantize")]
    assert sorted(found) == sorted(expected)
    assert begun == ["ceilings", "bf16", "w8a16"]
    by_line = {(t["family"], t["rows"]): t for t in json.loads(json.dumps(report.as_dict()))["timings"]}
    assert by_line["bf16", 1]["speed_over_bf16"] == 1
    first = next(t for t in report.timings if t.family == "w8a16")
    assert first.num_bytes == 64 * 128 + 2 * 128 + 2 * 64
    assert first.num_operations == 2 * 64 * 128


def test_steps_are_the_fastest_routes():
    timings = [timing(1, "skinny", 5), timing(1, "tile", 9), timing(1, "dense", 30)]
    timings += [timing(16, "skinny", 8), timing(16, "tile", 9), timing(16, "dense", 31)]
    timings += [timing(64, "tile", 10), timing(64, "dense", 31)]
    timings += [timing(2048, "tile", 90), timing(2048, "dense", 80)]
    assert steps_from(timings, FAMILY) == ((16, "skinny"), (64, "tile"), (None, "dense"))


def test_a_route_goes_on_where_another_is_hardly_faster():
    timings = [
        timing(64, "tile", 10),
        timing(64, "dense", 31),
        timing(2048, "tile", 80.5),
        timing(2048, "dense", 80),
    ]
    assert steps_from(timings, FAMILY) == ((None, "tile"),)


def test_any_number_of_rows_is_left_to_a_route_that_takes_it():
    timings = [timing(32, "skinny", 5), timing(32, "tile", 9), timing(32, "dense", 30)]
    assert steps_from(timings, FAMILY) == ((None, "tile"),)


def test_a_table_keeps_what_was_not_measured_again(tmp_path):
    path = tmp_path / "h100.json"
    other = WeightShape("other", 128, 128)
    first = [timing(2048, "dense", 1.0, shape) for shape in (SMALL, other)]
    update_table(path, H100, "2.11.0", first, FAMILIES)
    update_table(
        path, H100, "2.11.0", [timing(2048, "tile", 1.0), timing(1, "cublas", 1.0, family="bf16")], FAMILIES
    )
    families = read_table(path, FAMILIES).families
    assert families == {"w4a16": {(64, 128): ((None, "tile"),), (128, 128): ((None, "dense"),)}}
    assert [file.name for file in tmp_path.iterdir()] == ["h100.json"]


def test_a_table_of_another_device_or_with_mistakes_is_left_alone(tmp_path):
    path = tmp_path / "table.json"
    update_table(path, H100, "2.11.0", [timing(2048, "dense", 1.0)], FAMILIES)
    with pytest.raises(BenchError, match="a table of NVIDIA H100 80GB HBM3; this is NVIDIA L4"):
        update_table(path, Device("NVIDIA L4", (8, 9), 58), "2.11.0", [], FAMILIES)
    path.write_text("{}")
    with pytest.raises(BenchError, match="device: missing"):
        update_table(path, H100, "2.11.0", [], FAMILIES)
    assert path.read_text() == "{}"
