"""Every way to get it wrong that we could think of: exit 2, one line of problem, one of fix, nothing half-written."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from quantkit.cli.main import run
from tests.gguf_files import write_gguf
from tests.tiny_llama import tiny_tensors, write_tiny_llama

QUANTIZE = ["quantize", "model", "-r", "int4-all", "-o", "out"]
INFERENCE = ["generate", "model", "The quick"]
EVALUATE = ["eval", "model", "model", "--data", "text.txt", "--windows", "2", "--length", "16"]


class Bad(NamedTuple):
    """What is wrong, the command that meets it, and words that its two lines have to hold."""

    name: str
    command: list[str]
    problem: str
    fix: str
    prepare: Callable[[Path], object] = lambda folder: None


def setting(value: str) -> list[str]:
    """Quantize with one `--set`."""
    return [*QUANTIZE, "--set", value]


def recipe(text: str) -> Callable[[Path], object]:
    """Write recipe.yaml."""
    return lambda folder: (folder / "recipe.yaml").write_text(text, encoding="utf-8")


def config(**changes: object) -> Callable[[Path], object]:
    """Change keys of the model's config.json; None removes a key."""

    def change(folder: Path) -> None:
        file = folder / "model" / "config.json"
        content = json.loads(file.read_text(encoding="utf-8")) | changes
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Rewrite the model's tensors."""

    def rewrite(folder: Path) -> None:
        tensors = tiny_tensors()
        change(tensors)
        save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def file(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Write a file below the working folder."""

    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def damaged_header(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Replace the bytes of the weights."""

    def write(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return write


def sharded(
    weight_map: dict[str, str], shards: dict[str, dict[str, torch.Tensor]]
) -> Callable[[Path], object]:
    """Replace the weights by shards and an index."""

    def write(folder: Path) -> None:
        (folder / "model" / "model.safetensors").unlink()
        for name, tensors in shards.items():
            save_file(tensors, folder / "model" / name)
        index = folder / "model" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))

    return write


def poisoned(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    """Put one bad value into the last linear."""

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    return poison


def lying_size(raw: bytes) -> bytes:
    """Make the header say that a tensor is larger than it is."""
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    entry = next(value for key, value in header.items() if key != "__metadata__")
    entry["shape"] = [size * 2 for size in entry["shape"]]
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :]


def gguf_then(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """A tiny GGUF file, damaged."""

    def write(folder: Path) -> None:
        write_gguf(folder / "model.gguf")
        (folder / "model.gguf").write_bytes(change((folder / "model.gguf").read_bytes()))

    return write


def finished(*command: str) -> Callable[[Path], object]:
    """Run a command that has to succeed first."""

    def prepare(folder: Path) -> None:
        assert run(list(command)) == 0

    return prepare


GGUF = ["quantize", "model.gguf", "-r", "int4-all", "-o", "out"]
OWN = ["quantize", "model", "-r", "recipe.yaml", "-o", "out"]
ONE = {"a.weight": torch.ones(2, 2)}

TABLE = [
    # the checkpoint
    Bad("no such folder", ["quantize", "./nothing", "-r", "int4", "-o", "out"], "nothing", "hub id"),
    Bad(
        "config missing", QUANTIZE, "config.json", "config.json", lambda f: (f / "model/config.json").unlink()
    ),
    Bad("config not JSON", QUANTIZE, "not valid JSON", "again", file("model/config.json", "{")),
    Bad("config a list", QUANTIZE, "not a JSON object", "again", file("model/config.json", "[]")),
    Bad("config nested", QUANTIZE, "not valid JSON", "again", file("model/config.json", "[" * 100_000)),
    Bad(
        "weights missing",
        QUANTIZE,
        "no safetensors",
        "download",
        lambda f: (f / "model/model.safetensors").unlink(),
    ),
    Bad(
        "only pickled weights",
        QUANTIZE,
        "pickled",
        "safetensors",
        lambda f: (f / "model/model.safetensors").rename(f / "model/pytorch_model.bin"),
    ),
    Bad("truncated safetensors", QUANTIZE, "truncated", "again", damaged_header(lambda raw: raw[:-10])),
    Bad("empty safetensors", QUANTIZE, "too short", "again", damaged_header(lambda raw: b"")),
    Bad(
        "header announces too much",
        QUANTIZE,
        "announces",
        "again",
        damaged_header(lambda raw: b"\xff" * 8 + raw),
    ),
    Bad("header not JSON", QUANTIZE, "JSON", "again", damaged_header(lambda raw: raw[:8] + b"{" + raw[8:])),
    Bad("header lies about sizes", QUANTIZE, "bytes", "again", damaged_header(lying_size)),
    Bad(
        "unknown dtype",
        QUANTIZE,
        "F4",
        "convert",
        damaged_header(lambda raw: raw.replace(b'"BF16"', b'"F4"  ', 1)),
    ),
    Bad(
        "missing shard",
        QUANTIZE,
        "missing",
        "finish the download",
        sharded({"a.weight": "gone.safetensors"}, {}),
    ),
    Bad(
        "index leads outside",
        QUANTIZE,
        "not a file of this folder",
        "index",
        sharded({"a": "../x.safetensors"}, {}),
    ),
    Bad(
        "index promises too much",
        QUANTIZE,
        "does not hold it",
        "again",
        sharded({"b": "s.safetensors"}, {"s.safetensors": ONE}),
    ),
    Bad(
        "tensor in two shards",
        QUANTIZE,
        "two shards",
        "remove",
        sharded(
            {"a.weight": "s.safetensors", "b": "t.safetensors"},
            {"s.safetensors": ONE, "t.safetensors": ONE | {"b": torch.ones(1)}},
        ),
    ),
    Bad("no tensors", QUANTIZE, "no tensor", "again", lambda f: save_file({}, f / "model/model.safetensors")),
    Bad("NaN weight", QUANTIZE, "NaN", "again", weights(poisoned(float("nan")))),
    Bad("infinite weight", QUANTIZE, "infinite", "again", weights(poisoned(float("inf")))),
    Bad(
        "a linear is missing",
        QUANTIZE,
        "missing",
        "again",
        weights(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
    ),
    Bad("encoder-decoder", QUANTIZE, "encoder-decoder", "decoder-only", config(is_encoder_decoder=True)),
    Bad("not generative", QUANTIZE, "BertModel", "decoder-only", config(architectures=["BertModel"])),
    Bad(
        "unknown architecture",
        QUANTIZE,
        "flurbo",
        "",
        config(model_type="flurbo", architectures=["FlurboForCausalLM"]),
    ),
    Bad(
        "remote code only",
        QUANTIZE,
        "code",
        "",
        config(model_type="flurbo", architectures=None, auto_map={"AutoModelForCausalLM": "x.Flurbo"}),
    ),
    *(
        Bad(
            f"already quantized: {method}",
            QUANTIZE,
            f"already quantized with {method}",
            "original",
            config(quantization_config={"quant_method": method}),
        )
        for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors")
    ),
    Bad("revision of a folder", [*QUANTIZE, "--revision", "main"], "--revision", "leave out"),
    Bad(
        "hub id without a network",
        ["quantize", "no-one/nothing", "-r", "int4", "-o", "out"],
        "no-one/nothing",
        "",
    ),
    Bad(
        "GGUF is no GGUF",
        GGUF,
        "model.gguf",
        "",
        file("model.gguf", "not a GGUF at all, but long enough to look at"),
    ),
    Bad("GGUF empty", GGUF, "model.gguf", "", file("model.gguf", "")),
    Bad("GGUF truncated", GGUF, "model.gguf", "", gguf_then(lambda raw: raw[: len(raw) - 5000])),
    Bad("GGUF corrupted", GGUF, "model.gguf", "", gguf_then(lambda raw: raw[:16] + b"\xff" * 64 + raw[80:])),
    # the recipe
    Bad("unknown recipe", ["quantize", "model", "-r", "int44", "-o", "out"], "int44", "int4"),
    Bad(
        "unknown key",
        OWN,
        "recipe.yaml:2: unknown key group_sise",
        "group_size",
        recipe("weights: int4\ngroup_sise: 64\n"),
    ),
    Bad("key twice", OWN, "recipe.yaml:2", "remove", recipe("weights: int4\nweights: int8\n")),
    Bad("weights missing in recipe", OWN, "weights", "keys are", recipe("symmetric: true\n")),
    Bad("wrong type", OWN, "recipe.yaml:2", "", recipe("weights: int4\nsymmetric: 'yes please'\n")),
    Bad("recipe not YAML", OWN, "recipe.yaml:2", "correct", recipe("weights: [int4\n")),
    Bad("recipe a list", OWN, "recipe.yaml", "recipes int4", recipe("- int4\n")),
    Bad("recipe empty", OWN, "recipe.yaml", "", recipe("")),
    Bad("setting without =", setting("group_size"), "KEY=VALUE", "group_size=64"),
    Bad("setting of an unknown key", setting("colour=blue"), "colour", "keys are"),
    Bad("setting inside nothing", setting("a.b=1"), "a", "keys are"),
    Bad("setting not YAML", setting("group_size=[1"), "YAML", ""),
    Bad("group does not divide", setting("group_size=128"), "does not divide", "use"),
    Bad("group of 0", setting("group_size=0"), "group_size", ""),
    Bad("group of a word", setting("group_size=big"), "group_size", ""),
    Bad("group nobody has", setting("group_size=16"), "group_size 16", "32, 64 or 128"),
    Bad("three bits", setting("weights=int3"), "int3", ""),
    Bad(
        "FP8 with INT8 inputs",
        ["quantize", "model", "-r", "fp8-all", "-o", "out", "--set", "activations=int8"],
        "FP8 weights with INT8",
        "use",
    ),
    Bad(
        "asymmetric FP8",
        ["quantize", "model", "-r", "fp8-all", "-o", "out", "--set", "symmetric=false"],
        "zero point",
        "symmetric",
    ),
    Bad(
        "asymmetric with INT8 inputs",
        [*setting("activations=int8"), "--set", "symmetric=false"],
        "asymmetric",
        "symmetric",
    ),
    Bad("KV granularity without a KV cache", setting("kv_granularity=head"), "no effect", "remove"),
    Bad(
        "INT8 KV per head, uncalibrated",
        [*setting("kv_cache=int8"), "--set", "kv_granularity=head"],
        "measured on text",
        "token",
    ),
    Bad(
        "ignore matches nothing", setting("ignore=[model.layers.7.*]"), "matches no linear", "names look like"
    ),
    Bad(
        "override matches nothing",
        setting("overrides=[{match: nothing, keep: true}]"),
        "matches no linear",
        "names look like",
    ),
    Bad("override says nothing", setting("overrides=[{match: '*'}]"), "override needs", ""),
    Bad("pattern is no regex", setting("ignore=['re:(']"), "not a regular expression", "correct"),
    Bad("fused linears apart", setting("ignore=['*q_proj']"), "treated differently", "all of them"),
    Bad("nothing left to quantize", setting("ignore=['*']"), "leaves every linear", "another recipe"),
    # the output
    Bad("output is a file", QUANTIZE, "is a file", "folder", file("out", "mine")),
    Bad("output is somebody else's", QUANTIZE, "not empty", "does not exist", file("out/letter.txt", "mine")),
    Bad(
        "output is somebody else's, overwrite",
        [*QUANTIZE, "--overwrite"],
        "not empty",
        "does not exist",
        file("out/letter.txt", "mine"),
    ),
    Bad(
        "output inside the source",
        ["quantize", "model", "-r", "int4-all", "-o", "model/out"],
        "inside",
        "beside",
    ),
    Bad("output below a file", ["quantize", "model", "-r", "int4-all", "-o", "text.txt/out"], "text.txt", ""),
    Bad(
        "output of another plan", setting("scales=minmax"), "another plan", "--overwrite", finished(*QUANTIZE)
    ),
    # evaluation
    Bad("text missing", ["eval", "model", "model", "--data", "no.txt"], "no.txt", ""),
    Bad("text empty", EVALUATE, "text.txt", "", file("text.txt", "")),
    Bad("text binary", EVALUATE, "text.txt", "", file("text.txt", b"\xff\xfe\x00\x80" * 99)),
    Bad("text too short", EVALUATE, "tokens", "", file("text.txt", "too short")),
    Bad(
        "jsonl without text",
        ["eval", "model", "model", "--data", "t.jsonl"],
        "t.jsonl",
        "",
        file("t.jsonl", '{"a": 1}\n'),
    ),
    Bad("windows of 0", [*EVALUATE, "--windows", "0"], "windows", ""),
    Bad("gate is no number", [*EVALUATE, "--max-ppl-increase", "much"], "much", ""),
    Bad("candidate missing", ["eval", "model", "./other", "--data", "text.txt"], "other", ""),
    Bad(
        "another vocabulary",
        ["eval", "model", "other", "--data", "text.txt", "--windows", "2", "--length", "16"],
        "vocabulary",
        "",
        lambda f: write_tiny_llama(
            f / "other",
            tiny_tensors()
            | {
                "model.embed_tokens.weight": torch.ones(
                    330, tiny_tensors()["model.embed_tokens.weight"].shape[1], dtype=torch.bfloat16
                )
            },
            vocab_size=330,
        ),
    ),
    # running
    Bad("no rope", INFERENCE, "rope", "", config(rope_theta=None, rope_parameters=None)),
    Bad(
        "unknown rope",
        INFERENCE,
        "rope",
        "",
        config(rope_theta=None, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
    ),
    Bad("architecture without a definition", INFERENCE, "olmo2", "llama", config(model_type="olmo2")),
    Bad("unknown activation function", INFERENCE, "hidden_act", "", config(hidden_act="sinus")),
    Bad("shape against the config", INFERENCE, "model.", "", config(intermediate_size=80)),
    Bad("tokenizer missing", INFERENCE, "tokenizer", "", lambda f: (f / "model/tokenizer.json").unlink()),
    Bad("prompt too long", ["generate", "model", "fox " * 3000], "", ""),
    Bad("negative max-tokens", [*INFERENCE, "--max-tokens", "-1"], "max_tokens", ""),
    Bad("negative temperature", [*INFERENCE, "--temperature", "-1"], "temperature", ""),
    Bad("top_p of 2", [*INFERENCE, "--top-p", "2"], "top_p", ""),
    Bad("verify of nothing", ["verify", "./nothing"], "nothing", ""),
    # the command line
    Bad("unknown verb", ["quantise", "model"], "quantise", "--help"),
    Bad("unknown option", [*QUANTIZE, "--fast"], "--fast", "--help"),
    Bad("output left out", ["quantize", "model", "-r", "int4"], "output", "--help"),
]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with a good model and a good text, to be broken."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    write_tiny_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. Why?\n\n" * 30)
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, the caches apart."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.relative_to(folder).parts[0] not in {"cache", "hub"}
    }


def test_the_table_is_long_enough():
    assert len({bad.name for bad in TABLE}) == len(TABLE) >= 40


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_it_ends_in_two_lines(world, capsys, bad):
    bad.prepare(world)
    before = content(world)
    capsys.readouterr()

    assert run(bad.command) == 2

    out, err = capsys.readouterr()
    problems = [line for line in err.splitlines() if line.startswith("error: ")]
    fixes = [line for line in err.splitlines() if line.startswith("  fix: ")]
    assert len(problems) == len(fixes) == 1, err
    assert "Traceback" not in err
    assert out == ""
    assert bad.problem in problems[0]
    assert len(fixes[0]) > len("  fix: x")
    assert bad.fix in fixes[0]
    assert content(world) == before


def test_all_zero_rows_and_extreme_weights_are_quantized(world):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][:3] = 0
        tensors["model.layers.0.mlp.gate_proj.weight"] *= 1e30
        tensors["model.layers.0.mlp.down_proj.weight"] *= 1e-30

    weights(change)(world)
    for recipe_name in ("int4-all", "int8-all", "fp8-all"):
        assert run(["quantize", "model", "-r", recipe_name, "-o", recipe_name]) == 0
        assert run(["verify", recipe_name]) == 0
