"""`quantkit inspect` as typed: tables, JSON on stdout, and refusals with exit code 2."""

import json

import pytest
import torch

from quantkit.cli.main import run
from tests.checkpoints import LLAMA_CONFIG, llama_tensors, write_checkpoint


@pytest.fixture
def llama(tmp_path):
    return write_checkpoint(tmp_path / "llama", llama_tensors(), LLAMA_CONFIG)


def inspected(capsys, source, *options: str) -> dict:
    assert run(["inspect", str(source), "--json", *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


def test_json_counts_everything_once(capsys, llama):
    found = inspected(capsys, llama)
    tensors = llama_tensors().values()
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors)
    assert found["bytes"] == 2 * found["parameters"]
    for key in ("roles", "dtypes"):
        assert sum(count["tensors"] for count in found[key]) == len(tensors)
        assert sum(count["bytes"] for count in found[key]) == found["bytes"]
    assert {
        key: found[key] for key in ("architecture", "model_type", "layers", "vocabulary", "tied_head")
    } == {
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "layers": 2,
        "vocabulary": 96,
        "tied_head": False,
    }
    assert found["quantized"] is None


def test_whether_the_runtime_runs_it_is_what_the_runtime_says(capsys, tmp_path):
    config = {**LLAMA_CONFIG, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 10000.0}
    folder = write_checkpoint(tmp_path / "llama", llama_tensors(), config | {"hidden_act": "silu"})
    assert inspected(capsys, folder)["runtime"] == {"runs": True, "why_not": None}
    folder = write_checkpoint(tmp_path / "olmo2", llama_tensors(), config | {"model_type": "olmo2"})
    runtime = inspected(capsys, folder)["runtime"]
    assert runtime["runs"] is False
    assert "olmo2" in runtime["why_not"]


def test_names_that_look_like_markup_are_shown_as_they_are(capsys, tmp_path):
    folder = write_checkpoint(
        tmp_path / "a[bold]b[/x]", llama_tensors(), LLAMA_CONFIG | {"model_type": "llama"}
    )
    assert run(["inspect", str(folder)]) == 0
    assert "[bold]b[/x]" in capsys.readouterr().out.replace("\n", "")


def test_group_sizes_divide_the_width(capsys, llama):
    sizes = {
        (kind["role"], kind["in_features"]): kind["group_sizes"]
        for kind in inspected(capsys, llama)["quantizable"]
    }
    assert sizes == {("attention", 64): [64, 32], ("mlp", 64): [64, 32], ("mlp", 128): [128, 64, 32]}


def test_experts_get_group_sizes_that_divide_both_widths(capsys, tmp_path):
    tensors = {name: tensor for name, tensor in llama_tensors(layers=1).items() if ".mlp." not in name}
    tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(2, 64)
    for expert in range(2):
        for name, shape in {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}.items():
            tensors[f"model.layers.0.mlp.experts.{expert}.{name}.weight"] = torch.zeros(shape)
    config = {**LLAMA_CONFIG, "model_type": "qwen3_moe", "num_experts": 2, "num_hidden_layers": 1}
    found = inspected(capsys, write_checkpoint(tmp_path / "moe", tensors, config))
    experts = [kind for kind in found["quantizable"] if kind["role"] == "expert"]
    assert {kind["in_features"] for kind in experts} == {64, 96}
    assert all(kind["group_sizes"] == [32] for kind in experts)
    assert "a router: stays 16-bit in every recipe" in {count["name"] for count in found["stays"]}


@pytest.mark.parametrize(
    ("file", "text", "has"),
    [
        ("chat_template.jinja", "{{ messages }}", True),
        ("tokenizer_config.json", '{"chat_template": "{{ messages }}"}', True),
        ("tokenizer_config.json", "{}", False),
    ],
)
def test_chat_template(capsys, llama, file, text, has):
    (llama / file).write_text(text)
    assert inspected(capsys, llama)["chat_template"] is has


def test_the_tables_say_what_can_be_quantized_and_why_not_the_rest(capsys, llama):
    assert run(["inspect", str(llama)]) == 0
    printed = capsys.readouterr().out
    for words in (
        "LlamaForCausalLM",
        "Can be quantized",
        "64, 32",
        "the output head: stays 16-bit",
        "of its own",
    ):
        assert words in printed


def test_a_quantized_checkpoint_is_shown_and_refused_by_name(capsys, tmp_path):
    config = {**LLAMA_CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    tensors = llama_tensors()
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(8, 128, dtype=torch.int32)
    folder = write_checkpoint(tmp_path / "gptq", tensors, config)
    found = inspected(capsys, folder)
    assert (found["quantized"], found["quantizable"], found["parameters"]) == ("gptq", [], None)
    assert run(["inspect", str(folder)]) == 0
    assert "quantized already (gptq)" in capsys.readouterr().out


REFUSED = {
    "no such folder": (["inspect", "./nowhere"], "no such file or folder"),
    "no source": (["inspect"], "source"),
    "unknown option": (["inspect", "demo", "--bogus"], "--bogus"),
    "revision of a folder": (["inspect", ".", "--revision", "main"], "--revision main"),
    "unknown verb": (["inspekt"], "inspekt"),
}


@pytest.mark.parametrize(("arguments", "finding"), REFUSED.values(), ids=REFUSED.keys())
def test_mistakes_are_two_lines_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, finding):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    problem, fix = printed.err.splitlines()
    assert problem.startswith("error: ") and finding in problem
    assert fix.startswith("  fix: ")


def test_an_encoder_is_refused(capsys, tmp_path):
    config = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    assert run(["inspect", str(write_checkpoint(tmp_path / "bert", llama_tensors(), config))]) == 2
    assert "BertForMaskedLM is not a model that generates text" in capsys.readouterr().err
