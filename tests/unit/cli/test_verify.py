"""`quantkit verify` as typed: a table or one JSON object, exit 0, 1 with findings, 2 if it cannot be read."""

import json

import pytest

from quantkit.cli.main import run
from tests.product_schemes import KV_SCHEMES, SCHEMES
from tests.quantized_folders import LINEARS, write_quantized

W4, FP8 = SCHEMES["int4-g64-sym"], SCHEMES["fp8-channel-token"]


@pytest.fixture
def folder(tmp_path):
    scheme_of = lambda name: W4 if "mlp" in name else FP8  # noqa: E731
    return write_quantized(tmp_path / "model", scheme_of, kv=KV_SCHEMES["kv-fp8-tensor"]).path


def test_a_good_folder_exits_with_0_and_says_who_can_load_it(capsys, folder):
    assert run(["verify", str(folder)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for word in ("INT4 group 64", "FP8 tensor", f"{len(LINEARS)} of {len(LINEARS)}", "nothing is wrong"):
        assert word in printed.out
    assert all(loader in printed.out for loader in ("transformers", "vLLM", "SGLang"))


def test_json_is_one_object_on_stdout(capsys, folder):
    assert run(["verify", str(folder), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    report = json.loads(printed.out)
    assert report["ok"] is True and report["findings"] == []
    assert report["num_compared"] == report["num_quantized"] == len(LINEARS)
    assert report["kv_cache"] == "FP8 tensor"
    assert report["schemes"] == {"FP8 channel, inputs FP8 token": 8, "INT4 group 64": 6}
    assert [verdict["loader"] for verdict in report["loaders"]] == ["transformers", "vLLM", "SGLang"]
    assert set(report["loaders"][0]["reasons"][0]) == {"answer", "text", "evidence"}


def test_findings_are_listed_and_exit_with_1(capsys, folder):
    (folder / "tokenizer.json").unlink()
    (folder / ".quantkit-progress.jsonl").write_text("")
    assert run(["verify", str(folder)]) == 1
    assert "2 findings" in capsys.readouterr().out
    assert run(["verify", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert [finding["place"] for finding in report["findings"]] == [
        ".quantkit-progress.jsonl",
        "tokenizer.json",
    ]
    assert all(finding["found"] and finding["expected"] for finding in report["findings"])


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_folder_that_cannot_be_read_exits_with_2(capsys, folder, options):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert run(["verify", str(folder), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    error, fix = printed.err.splitlines()
    assert error.startswith("error: ") and "model.safetensors" in error and fix.startswith("  fix: ")


def test_a_path_that_does_not_exist_exits_with_2(capsys, tmp_path):
    assert run(["verify", str(tmp_path / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_long_names_are_printed_whole(capsys, folder):
    section = json.loads((folder / "config.json").read_text())
    name = f"model.layers.0.mlp.{'x' * 90}"
    section["quantization_config"]["ignore"].append(name)
    (folder / "config.json").write_text(json.dumps(section))
    assert run(["verify", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "1 finding" in printed and "…" not in printed and printed.count("x") >= 90
