"""Bad inputs through the real command line: exit code 2, one problem line, one fix line, nothing written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from quantkit.cli.main import run
from tests.tiny_llama import tiny_tensors, write_tiny_llama

Prepare = Callable[[Path], list[str]]
DOWN = "model.layers.0.mlp.down_proj.weight"


def source(p: Path, **config: object) -> Path:
    return write_tiny_llama(p / "src", **config)


def quantize(p: Path, *more: str, recipe: str = "int8", **config: object) -> list[str]:
    return ["quantize", str(source(p, **config)), "-r", recipe, "-o", str(p / "out"), *more]


def broken(name: str, content: bytes | None) -> Prepare:
    """Quantize with one file of the source replaced, or removed."""

    def prepare(p: Path) -> list[str]:
        command = quantize(p)
        file = p / "src" / name
        file.unlink() if content is None else file.write_bytes(content)
        return command

    return prepare


def weight(value: float) -> Prepare:
    def prepare(p: Path) -> list[str]:
        tensors = tiny_tensors()
        tensors[DOWN][3, 5] = value
        folder = write_tiny_llama(p / "src", tensors)
        return ["quantize", str(folder), "-r", "int8", "-o", str(p / "out")]

    return prepare


def recipe(text: str) -> Prepare:
    def prepare(p: Path) -> list[str]:
        (p / "r.yaml").write_text(text)
        return quantize(p, recipe=str(p / "r.yaml"))

    return prepare


def settings(*values: str, base: str = "int8") -> Prepare:
    return lambda p: quantize(p, *(part for value in values for part in ("--set", value)), recipe=base)


def truncated(p: Path) -> list[str]:
    command = quantize(p)
    file = p / "src" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return command


def quantized_already(method: str) -> Prepare:
    return lambda p: quantize(p, quantization_config={"quant_method": method, "bits": 4})


def foreign_output(p: Path) -> list[str]:
    (p / "out").mkdir()
    (p / "out" / "letter.txt").write_text("mine")
    return quantize(p)


def output_is_a_file(p: Path) -> list[str]:
    (p / "out").write_text("mine")
    return quantize(p)


def output_in_source(p: Path) -> list[str]:
    folder = source(p)
    return ["quantize", str(folder), "-r", "int8", "-o", str(folder)]


def evaluate(*more: str, text: bytes | None = None) -> Prepare:
    def prepare(p: Path) -> list[str]:
        folder = str(source(p))
        if text is not None:
            (p / "t.txt").write_bytes(text)
        return ["eval", folder, folder, *(part.replace("P/", f"{p}/") for part in more)]

    return prepare


def generate(*more: str, prompt: str = "dog", **config: object) -> Prepare:
    return lambda p: ["generate", str(source(p, **config)), prompt, "--raw", *more]


def gguf(content: bytes) -> Prepare:
    def prepare(p: Path) -> list[str]:
        (p / "m.gguf").write_bytes(content)
        return ["quantize", str(p / "m.gguf"), "-r", "int8", "-o", str(p / "out")]

    return prepare


LIST: list[tuple[str, Prepare, str, str]] = [
    ("missing-weights", broken("model.safetensors", None), "src", ""),
    ("truncated", truncated, "model.safetensors", ""),
    (
        "header-not-json",
        broken("model.safetensors", (8).to_bytes(8, "little") + b"notjson!"),
        "model.saf",
        "",
    ),
    (
        "header-too-long",
        broken("model.safetensors", (1 << 60).to_bytes(8, "little")),
        "model.safetensors",
        "",
    ),
    ("empty-weights", broken("model.safetensors", b""), "model.safetensors", ""),
    ("nan", weight(torch.nan), "down_proj", ""),
    ("inf", weight(torch.inf), "down_proj", ""),
    ("gptq", quantized_already("gptq"), "gptq", ""),
    ("awq", quantized_already("awq"), "awq", ""),
    ("bitsandbytes", quantized_already("bitsandbytes"), "bitsandbytes", ""),
    ("no-config", broken("config.json", None), "config.json", ""),
    ("config-not-json", broken("config.json", b"{"), "config.json", ""),
    ("config-a-list", broken("config.json", b"[]"), "config.json", ""),
    ("config-nested", broken("config.json", b"[" * 100000), "config.json", ""),
    ("group-0", settings("group_size=0", base="int4"), "group_size", ""),
    ("group-minus-1", settings("group_size=-1", base="int4"), "group_size", ""),
    ("group-96", settings("group_size=96", base="int4"), "96", ""),
    ("group-big", settings("group_size=big", base="int4"), "group_size", ""),
    ("unknown-key", settings("group_sise=64", base="int4"), "group_sise", "group_size"),
    ("set-no-equals", settings("group_size"), "not KEY=VALUE", "--set"),
    ("set-unknown-path", settings("nothing.here=1"), "nothing", "keys are"),
    ("set-bad-yaml", settings("weights=["), "not valid YAML", "quote"),
    ("int3", settings("weights=int3"), "int3", ""),
    ("ignore-no-match", settings("ignore=[nothing_like_it]"), "nothing_like_it", ""),
    ("recipe-typo", lambda p: quantize(p, recipe="int44"), "int44", "did you mean"),
    ("yaml-syntax", recipe("weights: [int4\n"), "r.yaml", "correct"),
    ("yaml-twice", recipe("weights: int4\nweights: int8\n"), "r.yaml:2", "remove"),
    ("yaml-list", recipe("- int4\n"), "r.yaml", "quantkit recipes"),
    ("foreign-output", foreign_output, "out", ""),
    ("output-a-file", output_is_a_file, "out", ""),
    ("output-in-source", output_in_source, "src", ""),
    ("eval-missing-text", evaluate("--data", "P/none.txt"), "none.txt", ""),
    ("eval-empty-text", evaluate("--data", "P/t.txt", text=b""), "t.txt", ""),
    ("eval-short-text", evaluate("--data", "P/t.txt", "--length", "64", text=b"dog"), "", ""),
    ("eval-binary-text", evaluate("--data", "P/t.txt", text=b"\xff\xfe\x00\x81" * 99), "t.txt", ""),
    ("eval-bad-gate", evaluate("--max-ppl-increase", "lots"), "lots", ""),
    ("eval-no-candidate", lambda p: ["eval", str(source(p)), str(p / "none")], "none", ""),
    ("gguf-empty", gguf(b""), "m.gguf", ""),
    ("gguf-not", gguf(b"hello, this is no gguf file" * 9), "m.gguf", ""),
    ("gguf-truncated", gguf(b"GGUF\x03\0\0\0\x01\0\0\0"), "m.gguf", ""),
    ("generate-arch", generate(architectures=["GPT2LMHeadModel"], model_type="gpt2"), "gpt2", ""),
    ("generate-max-tokens", generate("--max-tokens", "-1"), "max", ""),
    ("generate-temperature", generate("--temperature", "-1"), "temperature", ""),
    ("generate-top-p", generate("--top-p", "2"), "top", ""),
    ("generate-too-long", generate(prompt="dog " * 500), "128", ""),
    ("verify-missing", lambda p: ["verify", str(p / "none")], "none", ""),
    ("revision-folder", lambda p: quantize(p, "--revision", "main"), "revision", ""),
    ("typo-path", lambda p: ["inspect", str(p / "nonne")], "nonne", ""),
    ("unknown-verb", lambda p: ["quantise"], "quantise", "--help"),
    ("unknown-option", lambda p: ["quantize", "--fast"], "--fast", "--help"),
    ("missing-argument", lambda p: ["quantize"], "Missing", "--help"),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("prepare", "problem", "fix"), [pytest.param(*row, id=name) for name, *row in LIST])
def test_two_lines_and_nothing_written(prepare, problem, fix, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = prepare(tmp_path)
    before = contents(tmp_path)
    capsys.readouterr()
    assert run(command) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    fixes = [line for line in err.splitlines() if line.startswith("  fix:")]
    assert (len(errors), len(fixes), out) == (1, 1, ""), err
    assert problem in errors[0]
    assert fix in fixes[0]
    assert fixes[0] != "  fix: "
    assert "Traceback" not in err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("value", [0.0, 1e30, 1e-30])
def test_extreme_weights_stay_finite(value, tmp_path):
    tensors = tiny_tensors()
    tensors[DOWN][:] = value
    folder = write_tiny_llama(tmp_path / "src", tensors)
    assert run(["quantize", str(folder), "-r", "int8", "-o", str(tmp_path / "out")]) == 0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert file.get_tensor(name).float().isfinite().all(), name
