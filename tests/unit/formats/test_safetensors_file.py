"""Safetensors headers: what is valid reads back, anything else is a SourceError that names the file."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from quantkit.errors import SourceError
from quantkit.formats.safetensors_file import (
    DTYPES,
    as_bytes,
    encode_header,
    iter_bytes,
    read_header,
    read_metadata,
    read_rows,
    read_tensor,
)

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def some_tensors() -> dict[str, torch.Tensor]:
    """One tensor of each dtype and some odd shapes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for name, dtype in DTYPES.items()
    }
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "long": torch.arange(1000)}


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> bytes:
    file = tmp_path_factory.mktemp("valid") / "model.safetensors"
    save_file(some_tensors(), file, metadata={"format": "pt"})
    return file.read_bytes()


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "model.safetensors"


def with_header(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def read_or_refused(file: Path) -> dict[str, torch.Tensor] | None:
    """All tensors, or None where the file is refused as it should be."""
    try:
        infos = read_header(file)
        read_metadata(file)
        return {name: read_tensor(info) for name, info in infos.items()}
    except SourceError as error:
        assert str(file) in error.problem
        assert error.problem.isprintable()
        return None


def test_every_dtype_reads_back_as_the_library_wrote_it(file):
    tensors = some_tensors()
    save_file(tensors, file, metadata={"format": "pt"})
    for name, info in read_header(file).items():
        assert info.dtype == tensors[name].dtype
        read = read_tensor(info)
        assert read.shape == tensors[name].shape
        assert as_bytes(read) == as_bytes(tensors[name]) == b"".join(iter_bytes(info, chunk_bytes=7))
    assert read_metadata(file) == {"format": "pt"}


def test_rows_are_those_of_the_whole(file):
    weight = torch.arange(60).reshape(10, 6)
    save_file({"weight": weight}, file)
    info = read_header(file)["weight"]
    assert torch.equal(read_rows(info, 3, 7), weight[3:7])
    assert read_rows(info, 10, 10).shape == (0, 6)


def test_our_header_is_read_by_the_library(file):
    tensors = some_tensors()
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    file.write_bytes(encode_header(layout) + b"".join(as_bytes(tensor) for tensor in tensors.values()))
    loaded = load_file(file)
    assert all(as_bytes(loaded[name]) == as_bytes(tensor) for name, tensor in tensors.items())


def test_a_file_that_shrinks_while_it_is_read_is_noticed(file, valid):
    file.write_bytes(valid)
    info = max(read_header(file).values(), key=lambda info: info.end)
    file.write_bytes(valid[:-1])
    with pytest.raises(SourceError, match="ended inside tensor"):
        read_tensor(info)
    with pytest.raises(SourceError, match="ended inside tensor"):
        list(iter_bytes(info))


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DATA = b"\0" * 4
DAMAGED = {
    "empty file": (b"", "too short"),
    "seven bytes": (b"\0" * 7, "too short"),
    "length beyond the file": (struct.pack("<Q", 1000) + b"{}", "announces a header of 1000 bytes"),
    "length beyond any file": (b"\xff" * 8 + b"{}", "announces a header"),
    "no JSON": (with_header(b"{"), "not valid JSON"),
    "no UTF-8": (with_header(b'{"\xff": 1}'), "not valid JSON"),
    "UTF-16": (with_header('{"w": 1}'.encode("utf-16")), "not valid JSON"),
    "deep": (with_header(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "a number too long": (with_header(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "an array": (with_header([]), "not a JSON object"),
    "a key twice": (with_header(b'{"w": {}, "w": {}}'), "twice"),
    "an unprintable dtype": (with_header({"w": entry("F\n4")}, DATA), "which is not supported"),
    "no entry": (with_header({"w": 3}), "not safetensors"),
    "no dtype": (with_header({"w": {"shape": [1], "data_offsets": [0, 4]}}, DATA), "not safetensors"),
    "a dtype that is a list": (with_header({"w": entry(["F32"])}, DATA), "not safetensors"),
    "an unknown dtype": (with_header({"w": entry("F4")}, DATA), "dtype 'F4', which is not supported"),
    "a shape that is an object": (with_header({"w": entry(shape={})}, DATA), "not safetensors"),
    "a negative extent": (with_header({"w": entry(shape=[-1])}, DATA), "not safetensors"),
    "a fractional extent": (with_header({"w": entry(shape=[1.0])}, DATA), "not safetensors"),
    "a true extent": (with_header({"w": entry(shape=[True])}, DATA), "not safetensors"),
    "one offset": (with_header({"w": entry(offsets=[0])}, DATA), "not safetensors"),
    "offsets turned round": (with_header({"w": entry(offsets=[4, 0])}, DATA), "takes another number"),
    "bytes that do not fit the shape": (with_header({"w": entry(shape=[2])}, DATA), "takes another number"),
    "an extent that overflows": (
        with_header({"w": entry(shape=[0, 2**70], offsets=[0, 0])}),
        "not safetensors",
    ),
    "extents that overflow": (
        with_header({"w": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}),
        "not safetensors",
    ),
    "a hole": (with_header({"w": entry(offsets=[4, 8])}, DATA * 2), "hole or an overlap"),
    "an overlap": (with_header({"v": entry(), "w": entry()}, DATA), "hole or an overlap"),
    "truncated": (with_header({"w": entry()}, DATA[:3]), "truncated"),
    "too long": (with_header({"w": entry()}, DATA + b"\0"), "should be"),
    "metadata that is a list": (with_header({"__metadata__": []}), "metadata"),
    "metadata with a number": (with_header({"__metadata__": {"format": 1}}), "metadata"),
    "a name with a line break": (with_header({"w\n": entry()}, DATA), "name"),
    "half a surrogate pair": (with_header(b'{"\\ud800": {}}'), "name"),
}


@pytest.mark.parametrize(("raw", "finding"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_named(file, raw, finding):
    file.write_bytes(raw)
    with pytest.raises(SourceError, match=finding) as caught:
        read_header(file)
    assert str(file) in caught.value.problem
    assert caught.value.problem.isprintable()


@FUZZ
@given(data=st.data())
def test_mutated_bytes_are_read_or_refused(valid, file, data):
    (length,) = struct.unpack("<Q", valid[:8])
    mutated = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(mutated[: data.draw(st.one_of(st.just(len(valid)), st.integers(0, len(valid))))])
    read_or_refused(file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "F4"]) | JSON,
        "shape": st.lists(st.integers(-1, 9) | st.integers(), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | JSON,
    },
)
NAMES = st.sampled_from(["a", "b.weight", "__metadata__"]) | st.text(max_size=4)


@FUZZ
@given(header=st.dictionaries(NAMES, ENTRY | JSON, max_size=4), data=st.binary(max_size=64))
@example(header={"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, data=b"\0" * 8)
@example(header={"a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, data=b"\7\xff")
def test_what_is_read_is_what_the_library_reads(file, header, data):
    file.write_bytes(with_header(header, data))
    ours = read_or_refused(file)
    if ours is None:
        return
    with safe_open(file, "pt") as theirs:
        assert set(theirs.keys()) == ours.keys()
        for name, tensor in ours.items():
            assert theirs.get_tensor(name).shape == tensor.shape
            assert as_bytes(theirs.get_tensor(name)) == as_bytes(tensor)


@FUZZ
@given(
    shapes=st.dictionaries(
        st.text(st.characters(categories=["L", "N"], include_characters="._"), min_size=1, max_size=8),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=5,
    )
)
def test_what_the_library_writes_is_read(file, shapes):
    tensors = {name: torch.zeros(shape, dtype=DTYPES[dtype]) for name, (dtype, shape) in shapes.items()}
    try:
        save_file(tensors, file)
    except SafetensorError:
        return
    ours = read_or_refused(file)
    assert ours is not None
    assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }
