"""Which route is chosen: from a table, from a related one, by rule, and one for all numbers of rows."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit_kernels import dispatch
from quantkit_kernels.catalog import GPU_FAMILIES, gpu_families
from quantkit_kernels.dispatch import Device, ladder_of, nearest_shape, nearest_table
from quantkit_kernels.dispatch_table import Table, TableError, read_table
from tests.unit.kernels.families import DENSE, FAMILIES, FAMILY, SKINNY, TILE

H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 132)
STEPS = ((8, "skinny"), (256, "tile"), (None, "dense"))


def table(device=H100, shapes=None):
    return Table(
        device=device.name,
        capability=device.capability,
        multiprocessors=device.multiprocessors,
        measured="2026-01-31, torch 2.11.0",
        families={"w4a16": shapes or {(4096, 4096): STEPS}},
    )


def routes(ladder, rows):
    return [ladder.at(m).name for m in rows]


def test_steps_end_at_their_limits():
    ladder = ladder_of(FAMILY, 4096, 4096, H100, [table()])
    assert routes(ladder, (1, 8, 9, 256, 257, 1 << 20)) == [
        "skinny",
        "skinny",
        "tile",
        "tile",
        "dense",
        "dense",
    ]
    assert ladder.source == H100.name


@pytest.mark.parametrize(
    ("shape", "nearest"),
    [
        ((4096, 4096), (4096, 4096)),
        ((5120, 5120), (4096, 4096)),
        ((14336, 4096), (28672, 4096)),
        ((64, 64), (4096, 4096)),
    ],
)
def test_a_weight_takes_the_nearest_shape(shape, nearest):
    assert nearest_shape(shape, [(28672, 4096), (4096, 14336), (4096, 4096)]) == nearest


def test_of_shapes_as_near_the_smaller_is_taken_in_any_order():
    for shapes in ([(2048, 4096), (8192, 4096)], [(8192, 4096), (2048, 4096)]):
        assert nearest_shape((4096, 4096), shapes) == (2048, 4096)


def test_an_unknown_device_follows_the_nearest_of_its_generation():
    h200, small = Device("NVIDIA H200", (9, 0), 132), Device("NVIDIA H100 PCIe", (9, 0), 114)
    a100 = Device("NVIDIA A100", (8, 0), 108)
    tables = [table(a100), table(small), table(H100)]
    assert nearest_table("w4a16", h200, tables).device == H100.name
    assert nearest_table("w4a16", small, tables).device == small.name
    assert nearest_table("w4a16", Device("NVIDIA L4", (8, 9), 58), tables).device == a100.name
    assert nearest_table("w4a16", Device("NVIDIA B200", (10, 0), 148), tables) is None
    assert nearest_table("w8a16", H100, tables) is None


def test_a_route_that_the_device_lacks_leaves_its_rows_to_the_next():
    ladder = ladder_of(FAMILY, 4096, 4096, Device("NVIDIA H300", (9, 5), 132), [table()])
    assert ladder.limits == (8,)
    assert routes(ladder, (8, 9, 1000)) == ["skinny", "dense", "dense"]


def test_the_last_route_follows_where_the_one_for_any_rows_is_lacking():
    shapes = {(4096, 4096): ((8, "skinny"), (None, "tile"))}
    ladder = ladder_of(FAMILY, 4096, 4096, Device("NVIDIA H300", (9, 5), 132), [table(shapes=shapes)])
    assert routes(ladder, (8, 9)) == ["skinny", "dense"]


def test_without_a_table_each_route_goes_as_far_as_it_can():
    ladder = ladder_of(FAMILY, 4096, 4096, H100, [])
    assert (ladder.limits, ladder.routes, ladder.source) == ((32, 256), (SKINNY, TILE, DENSE), "rule")
    assert ladder_of(FAMILY, 4096, 4096, Device("NVIDIA B200", (10, 0), 148), []).routes == (SKINNY, DENSE)
    assert ladder_of(FAMILY, 4096, 4096, Device("NVIDIA A100", (8, 0), 108), []).routes == (DENSE,)


@given(
    limits=st.sets(st.integers(1, 300), max_size=5),
    names=st.lists(st.sampled_from(["tile", "dense"]), min_size=6, max_size=6),
    rows=st.integers(1, 400),
    capability=st.sampled_from([(8, 0), (9, 0), (9, 5), (12, 0)]),
)
def test_whatever_is_chosen_takes_the_rows_on_the_device(limits, names, rows, capability):
    steps = tuple(zip([*sorted(limits), None], names, strict=False))
    device = Device("any", capability, 1)
    route = ladder_of(FAMILY, 1, 1, device, [table(device, {(1, 1): steps})]).at(rows)
    assert route in FAMILY.usable(rows, capability)
    named = next(name for limit, name in steps if limit is None or rows <= limit)
    if named in {of.name for of in FAMILY.usable(rows, capability)}:
        assert route.name == named


@pytest.fixture
def one_device(monkeypatch, tmp_path):
    """A device and a folder of tables, without a GPU."""
    monkeypatch.setattr(dispatch, "_ladders", {})
    monkeypatch.setattr(dispatch, "device_of", lambda index: H100)
    monkeypatch.setattr(dispatch, "gpu_families", lambda: FAMILIES)
    monkeypatch.setattr(dispatch, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    dispatch.tables.cache_clear()
    yield tmp_path
    dispatch.tables.cache_clear()


def write(folder, text):
    folder.mkdir(parents=True)
    (folder / "h100.json").write_text(text)


def test_choose_reads_the_tables_once(one_device):
    write(one_device / "shipped", table().as_json())
    device = torch.device("cuda", 0)
    assert dispatch.choose(FAMILY, 8, 4096, 4096, device) is SKINNY
    (one_device / "shipped" / "h100.json").write_text("")
    assert dispatch.choose(FAMILY, 9, 4096, 4096, device) is TILE


def test_a_table_of_this_machine_stands_in_for_the_one_shipped(one_device):
    write(one_device / "shipped", table().as_json())
    write(dispatch.local_folder(), table(shapes={(4096, 4096): ((None, "dense"),)}).as_json())
    assert dispatch.choose(FAMILY, 1, 4096, 4096, torch.device("cuda", 0)) is DENSE


STALE = table(shapes={(4096, 4096): ((None, "dense"),)}).as_json().replace('"dense"', '"cutlass"')


@pytest.mark.parametrize("text", [STALE, STALE.replace("w4a16", "w5a16"), "", "no json"])
def test_a_table_of_this_machine_that_makes_no_sense_is_named_and_left_out(one_device, text):
    write(one_device / "shipped", table().as_json())
    write(dispatch.local_folder(), text)
    with pytest.warns(UserWarning, match=r"dispatch/h100\.json: "):
        assert dispatch.choose(FAMILY, 1, 4096, 4096, torch.device("cuda", 0)) is SKINNY


def test_tables_of_this_machine_that_may_not_be_read_are_named_and_left_out(one_device, monkeypatch):
    write(one_device / "shipped", table().as_json())
    write(dispatch.local_folder(), table().as_json())
    for function in ("read_text", "iterdir"):
        dispatch.tables.cache_clear()
        original = getattr(dispatch.Path, function)
        forbidden = dispatch.local_folder()

        def of_another_user(path, original=original, forbidden=forbidden):
            if forbidden in (path, path.parent):
                raise PermissionError(13, "Permission denied", str(path))
            return original(path)

        monkeypatch.setattr(dispatch.Path, function, of_another_user)
        with pytest.warns(UserWarning, match="Permission denied"):
            assert [of.device for of in dispatch.tables()] == [H100.name]


def test_a_user_without_a_home_has_the_tables_that_are_shipped(one_device, without_home):
    write(one_device / "shipped", table().as_json())
    assert dispatch.local_folder() is None and len(dispatch.tables()) == 1


@pytest.fixture
def without_home(monkeypatch):
    """The environment of a user id that no password file knows."""
    monkeypatch.delenv("QUANTKIT_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "h100.json"
    path.write_text(table(shapes={(4096, 4096): STEPS, (1, 3): ((None, "tile"),)}).as_json())
    assert read_table(path, FAMILIES) == table(shapes={(1, 3): ((None, "tile"),), (4096, 4096): STEPS})


def change(place, value):
    """The text of a table with one value replaced, or, where it is None, removed."""
    content = json.loads(table().as_json())
    at = content
    for key in place[:-1]:
        at = at[key]
    if value is None:
        del at[place[-1]]
    else:
        at[place[-1]] = value
    return json.dumps(content)


SHAPE = ("families", "w4a16", "4096x4096")


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("{", "Expecting property name"),
        ("[]", "expected an object, found []"),
        ('{"device": "a", "device": "b"}', "device stands there twice"),
        (
            change(["speed"], 1),
            "speed: unknown key; known: device, capability, multiprocessors, measured, families",
        ),
        (change(["device"], None), "device: missing"),
        (change(["multiprocessors"], "132"), 'multiprocessors: expected int, found "132"'),
        (change(["multiprocessors"], True), "multiprocessors: expected int, found true"),
        (change(["capability"], [9]), "capability: expected [major, minor], found [9]"),
        (change(["families", "w5a16"], {}), "families.w5a16: no such family; known: w4a16"),
        (change(["families", "w4a16"], {}), "families.w4a16: expected shapes, found {}"),
        (change(["families", "w4a16", "4096"], []), "families.w4a16.4096: expected a shape like 4096x14336"),
        (change(SHAPE, []), "families.w4a16.4096x4096: expected steps, found []"),
        (change([*SHAPE, 0], [8]), "families.w4a16.4096x4096[0]: expected [rows, route], found [8]"),
        (change([*SHAPE, 0, 1], "skiny"), '4096x4096[0]: no route "skiny"; w4a16 has skinny, tile, dense'),
        (change([*SHAPE, 1, 0], 8), "4096x4096[1]: expected more than 8 rows, found 8"),
        (change([*SHAPE, 1, 0], 8.5), "4096x4096[1]: expected more than 8 rows, found 8.5"),
        (change([*SHAPE, 2, 0], 300), "4096x4096[2]: the last step takes any number of rows: null, not 300"),
        (change([*SHAPE, 0, 0], 33), "4096x4096[0]: route skinny takes up to 32 rows"),
        (change([*SHAPE, 2, 1], "skinny"), "4096x4096[2]: route skinny takes up to 32 rows"),
    ],
)
def test_a_mistake_is_named_with_its_file_and_place(text, finding, tmp_path):
    path = tmp_path / "h100.json"
    path.write_text(text)
    with pytest.raises(TableError) as error:
        read_table(path, FAMILIES)
    assert str(error.value).startswith(f"{path}: ")
    assert finding in str(error.value)


@pytest.mark.parametrize("path", sorted(dispatch.SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables_can_be_read(path):
    for entry in GPU_FAMILIES:
        pytest.importorskip(f"quantkit_kernels.{entry.module}")
    read = read_table(path, gpu_families())
    assert read.families
    assert path.read_text() == read.as_json()
