"""The verb: one JSON object or a table on stdout, the rest on stderr, and the exit code."""

import json
import os
from io import StringIO
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from quantkit.cli.eval_display import show
from quantkit.cli.main import run
from tests.evaluation_reports import candidate, comparison, report
from tests.packers import write_packed_llama
from tests.tiny_llama import tiny_tensors, write_tiny_llama


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Original and candidate that the real runtime runs, and a text."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_tiny_llama(tmp_path / "original")
    tensors = tiny_tensors()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if "proj" in name:
            tensors[name] = tensor + 0.02 * torch.randn(tensor.shape, generator=generator).bfloat16()
    write_tiny_llama(tmp_path / "candidate", tensors)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. Why?\n\n" * 30)
    return tmp_path


def quantkit_eval(*arguments, candidate="candidate"):
    options = ["--data", "text.txt", "--windows", "4", "--length", "16", "--device", "cpu"]
    return run(["eval", "original", candidate, *options, *arguments])


def test_json_is_one_object_with_the_promised_keys(world, capsys):
    assert quantkit_eval("--json", "--max-kl", "10") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report.keys() == {
        *("reference", "data", "device", "kv_cache_dtype", "candidates", "gates", "passed", "notes"),
        *("environment", "command"),
    }
    assert {"path", "ppl", "bytes", "bits_per_weight", "kl_noise_floor"} <= report["reference"].keys()
    assert report["data"].keys() == {"spec", "tokens", "hash", "windows", "length"}
    (candidate,) = report["candidates"]
    assert {
        *(
            "path",
            "kind",
            "dtype",
            "backend",
            "kernels",
            "ppl",
            "kl_mean",
            "kl_ci",
            "kl_median",
            "kl_p99",
            "kl_noise_floor",
        ),
        *("top1", "bits_per_weight", "bytes", "failure", "kl_histogram", "where", "worst"),
    } <= candidate.keys()
    assert (
        candidate["path"] == "candidate"
        and candidate["kl_ci"][0] <= candidate["kl_mean"] <= candidate["kl_ci"][1]
    )
    assert report["gates"] == [
        {
            "gate": "max_kl",
            "candidate": "candidate",
            "limit": 10.0,
            "value": candidate["kl_mean"],
            "passed": True,
            "task": None,
            "interval": candidate["kl_ci"],
        }
    ]
    assert "windows" in err


def test_map_and_page(world, capsys):
    assert quantkit_eval("--where", "--report", "page.html", "--json") == 0
    out, err = capsys.readouterr()
    (candidate,) = json.loads(out)["candidates"]
    linears = candidate["where"]["linears"]
    assert len(linears) == 2 * (7 + 1) and all(linear["kl_in"] > 0 for linear in linears)
    assert sum(share for _, share, _ in candidate["where"]["by_class"]) == pytest.approx(1)
    assert 1 <= len(candidate["worst"]) <= 4 and candidate["worst"][0]["context"]
    assert sum(candidate["kl_histogram"][1]) == 4 * 16
    page = (world / "page.html").read_text()
    assert "Where it hurts" in page and "The worst positions" in page and linears[0]["linear"] in page
    assert "linears swapped" in err


def test_a_candidate_in_another_basis_has_figures_and_no_map(world, capsys):
    tensors = tiny_tensors()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(1)
    write_tiny_llama(world / "rotated", tensors)
    assert quantkit_eval("--where", "--json", candidate="rotated") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["candidates"][0]["where"] is None and report["candidates"][0]["kl_mean"] > 0
    assert "as if its hidden states were rotated" in report["notes"][0]


def test_candidates_are_run_as_the_options_say(world, capsys):
    assert quantkit_eval("--dtype", "bfloat16", "--kv-cache-dtype", "int8", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["device"], report["kv_cache_dtype"]) == ("cpu", "int8")
    assert (report["candidates"][0]["dtype"], report["candidates"][0]["kernels"]) == ("bfloat16", "torch")
    assert quantkit_eval("--kv-cache-dtype", "fp8") == 0
    assert "Candidates in float32 (torch) on cpu, KV cache in fp8." in " ".join(
        capsys.readouterr().out.split()
    )


def test_gptq_awq_and_bitsandbytes_are_candidates_like_any_other(world, capsys):
    write_packed_llama(world / "gptq", "gptq", {"desc_act": True}, order_seed=2)
    write_packed_llama(world / "awq", "awq", {"version": "gemm"})
    options = ["--data", "text.txt", "--windows", "2", "--length", "16", "--device", "cpu", "--json"]
    assert run(["eval", "original", "gptq", "awq", "bnb:nf4", *options]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    kinds = [(row["kind"], row["backend"]) for row in report["candidates"]]
    assert kinds == [("GPTQ", "quantkit"), ("AWQ", "quantkit"), ("bnb:nf4", "bitsandbytes")]
    assert all(0 < row["kl_mean"] < 1 for row in report["candidates"])
    assert all("are dequantized" in note for note in report["notes"][:2]) and report["notes"][0] in err
    assert run(["eval", "original", "gptq", *options, "--backend", "transformers"]) == 2
    assert "which transformers cannot run here" in capsys.readouterr().err


def test_table_has_a_row_for_each(world, capsys):
    assert quantkit_eval() == 0
    out = capsys.readouterr().out
    assert "original" in out and "candidate" in out and "noise" in out and "±" in out


def test_failed_gates_exit_with_1_and_say_by_how_much(world, capsys):
    assert quantkit_eval("--max-kl", "0.000001", "--max-ppl-increase", "-50%", "--min-top1", "1") == 1
    err = capsys.readouterr().err
    for option in ("--max-kl 1e-06", "--max-ppl-increase -50%", "--min-top1 1"):
        assert f"candidate: {option} not met" in err


def test_a_suite_decides_unless_an_option_does_and_leaves_files_for_ci(world, capsys):
    (world / "mine.yaml").write_text(
        "data: text.txt\nwindows: 3\nlength: 16\nthresholds: {max_kl: 1.0e-6, min_top1: 0.0}\n"
    )
    files = ["--junit", "gates.xml", "--markdown", "summary.md"]
    command = ["eval", "original", "candidate", "--suite", "mine.yaml", "--device", "cpu", *files, "--json"]
    assert run(command) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["data"]["spec"], report["data"]["windows"]) == ("text.txt", 3)
    assert "candidate: --max-kl 1e-06 not met: KL" in err and "excludes" in err
    cases = ElementTree.parse(world / "gates.xml").getroot().findall(".//testcase")
    assert [len(case) for case in cases] == [0, 1, 0]
    assert (world / "summary.md").read_text(encoding="utf-8").startswith("## ❌ 1 of 2 gates not met")
    assert run([*command, "--max-kl", "100", "--windows", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["data"]["windows"] == 2 and report["gates"][0]["limit"] == 100.0


def test_a_file_that_cannot_be_written_costs_no_other_and_no_figure(world, capsys):
    (world / ".page.html.partial").mkdir()  # what it would be written to first
    assert quantkit_eval("--report", "page.html", "--markdown", "summary.md", "--max-kl", "1e-6") == 2
    out, err = capsys.readouterr()
    assert "candidate" in out and "--max-kl 1e-06 not met" in err
    assert "error: not written: page.html: Is a directory" in err
    assert (world / "summary.md").exists() and not (world / "page.html").exists()


def test_one_window_has_no_interval(world, capsys):
    assert (
        run(
            [
                "eval",
                "original",
                "candidate",
                "--data",
                "text.txt",
                "--windows",
                "1",
                "--length",
                "16",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["candidates"][0]["kl_ci"] is None


def test_nan_weights_are_a_verdict_not_a_crash(world, capsys):
    tensors = tiny_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    write_tiny_llama(world / "broken", tensors)
    code = run(
        [
            "eval",
            "original",
            "broken",
            "candidate",
            "--data",
            "text.txt",
            "--windows",
            "2",
            "--length",
            "16",
            "--json",
        ]
    )
    out, err = capsys.readouterr()
    broken, fine = json.loads(out)["candidates"]
    assert code == 1
    assert "NaN logits" in broken["failure"] and broken["ppl"] is None and fine["ppl"] > 0
    assert "broken produces NaN logits" in err


@pytest.mark.parametrize(
    ("arguments", "finding"),
    [
        (["--max-ppl-increase", "few"], "--max-ppl-increase few"),
        (["--min-top1", "90"], "--min-top1 90"),
        (["--max-kl", "nan"], "--max-kl nan"),
        (["--windows", "0"], "--windows 0"),
        (["--windows", "100000"], "100000 windows of 16"),
        (["--data", "absent.txt"], "absent.txt"),
        (["--suite", "quik"], "--suite quik"),
        (["--min-recovery", "most"], "--min-recovery most"),
        (["--min-recovery", "90%"], "--min-recovery"),
        (["--junit", "absent/gates.xml"], "there is no folder absent"),
        (["--markdown", "absent/summary.md"], "there is no folder absent"),
        (["--report", "candidate"], "candidate: is a folder"),
        (["--markdown", "pipe"], "pipe: is a pipe or a device"),
        (["--markdown", "stdout"], "stdout: is a pipe or a device"),
        (["--tasks", ","], "--tasks ','"),
    ],
)
def test_mistakes_are_two_lines_and_exit_with_2(world, capsys, arguments, finding):
    os.mkfifo(world / "pipe")
    (world / "stdout").symlink_to("/proc/self/fd/1")  # as /dev/stdout is
    assert quantkit_eval(*arguments) == 2
    out, err = capsys.readouterr()
    problem, fix = err.strip().splitlines()
    assert problem.startswith("error: ") and finding in problem and fix.startswith("  fix: ")
    assert out == ""


def test_card_of_a_folder_of_ours_is_filled_and_a_locked_one_is_no_failure(world, capsys):
    from quantkit.card import EVALUATION_END, EVALUATION_START

    card = world / "candidate" / "README.md"
    card.write_text(f"# x\n{EVALUATION_START}\nNot evaluated yet\n{EVALUATION_END}\n")
    (world / "candidate" / "quantkit.json").write_text("{}")
    assert quantkit_eval() == 0
    assert "KL divergence" in card.read_text()
    card.write_bytes(EVALUATION_START.encode() + b"\xff" + EVALUATION_END.encode())
    assert quantkit_eval() == 0
    assert "candidate: the figures are not in its README.md" in capsys.readouterr().err


def test_the_map_is_shown_where_nothing_else_was_asked_for(world, capsys):
    assert quantkit_eval("--where") == 0
    shown = capsys.readouterr().out
    assert "worst linears of candidate" in shown and shown.count("_proj") == 8
    assert quantkit_eval("--where", candidate="original") == 0
    assert "nothing to swap" in capsys.readouterr().out


def test_names_of_folders_are_no_markup():
    out, name = StringIO(), "runs/[red]int4[/blue]"
    show(report(candidate(name, tasks=(comparison(),))), Console(file=out, width=200))
    assert f"tasks of {name}" in out.getvalue() and out.getvalue().count(name) == 2
