"""Tasks of two models from end to end: what lm-eval's evaluator finds, what is logged, continued, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from scipy.stats import binom
from tokenizers import processors

from quantkit import LLM
from quantkit.cli.main import run
from quantkit.errors import EvaluationError
from quantkit.evaluation import evaluate
from quantkit.evaluation.suites import TaskRequest
from quantkit.evaluation.tasks import statistics
from quantkit.evaluation.tasks.engine_lm import EngineLM
from quantkit.evaluation.tasks.library import load_tasks
from quantkit.evaluation.tasks.quiet import quiet
from quantkit.evaluation.tasks.run import run_task
from quantkit.evaluation.tasks.sample_log import SampleLog
from tests.byte_tokenizer import TEMPLATE
from tests.lm_eval_tasks import TASKS, write_tasks
from tests.product_schemes import SCHEMES
from tests.tiny_models import CONFIGS, quantize_tiny, save_tiny

ITEMS = 24


@pytest.fixture
def world(tmp_path, byte_tokenizer, monkeypatch):
    """`original`, `candidate` (INT2) and a text; the tasks in place of the probes; a cache."""
    config = CONFIGS["llama"].to_dict() | {"vocab_size": 260, "max_position_embeddings": 400}
    monkeypatch.setitem(CONFIGS, "bytes", type(CONFIGS["llama"])(**config))
    save_tiny("bytes", tmp_path / "original")
    quantize_tiny(tmp_path / "original", tmp_path / "candidate", SCHEMES["int2-g32-sym"])
    byte_tokenizer.chat_template = TEMPLATE
    for name in ("original", "candidate"):
        byte_tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 30)
    write_tasks(tmp_path / "eval" / "probes", num_items=ITEMS)
    monkeypatch.setattr("quantkit.evaluation.tasks.library.data_dir", lambda name: tmp_path / name)
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def evaluated(world, *tasks, **options):
    text = {"data": str(world / "text.txt"), "windows": 1, "length": 16, "device": "cpu"}
    return evaluate(world / "original", [world / "candidate"], tasks=tasks or ("tiny",), **text, **options)


def figures(report):
    """As text: NaN is no number, and not itself."""
    return json.dumps(report.to_json()["candidates"])


def lines(world):
    """Of all logs, by file."""
    return {file: file.read_text().splitlines() for file in sorted(world.glob("cache/samples/*/*.jsonl"))}


def test_scores_are_those_of_lm_evals_evaluator(world):
    from lm_eval.evaluator import evaluate as reference
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from quantkit.evaluation.tasks.hf_lm import transformers_lm

    report = evaluated(world, limit=9, num_fewshot=1)
    assert [gone.failure for gone in report.candidates] == [None]
    for folder, column in (("original", "reference"), ("candidate", "candidate")):
        model = AutoModelForCausalLM.from_pretrained(world / folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(world / folder)
        tokenizer.pad_token = tokenizer.eos_token
        loaded = load_tasks([TaskRequest(name="tiny", limit=9, num_fewshot=1)], say=print)
        with quiet():
            lm = transformers_lm(model, tokenizer, batch_size=4)
            tasks = {"tasks": {one.name: one.task for one in loaded}}
            found = reference(lm, tasks, limit=9, bootstrap_iters=0)["results"]
        for comparison in report.candidates[0].tasks:
            score = found[comparison.task][f"{comparison.metric},none"]
            assert getattr(comparison, column) == pytest.approx(score, rel=1e-4), comparison
            assert comparison.num_items == 9
    assert {comparison.task for comparison in report.candidates[0].tasks} == set(TASKS)


def test_a_comparison_says_which_items_flipped(world, byte_tokenizer, monkeypatch):
    monkeypatch.setitem(CONFIGS, "other bytes", CONFIGS["bytes"])
    shutil.rmtree(world / "candidate")
    save_tiny("other bytes", world / "candidate")  # weights of its own, so other answers
    byte_tokenizer.save_pretrained(world / "candidate")
    report = evaluated(world, "tiny_choice")
    acc, acc_norm = report.candidates[0].tasks
    assert (acc.metric, acc.group, acc.test, acc.chance) == (
        "acc",
        "task",
        "McNemar, exact",
        pytest.approx(1 / 3),
    )
    lost = sum(flip.was_right for flip in acc.flips)
    assert acc.flips and acc.candidate - acc.reference == pytest.approx((len(acc.flips) - 2 * lost) / ITEMS)
    for comparison in (acc, acc_norm):
        for flip in comparison.flips:
            assert (flip.reference == flip.target) == flip.was_right != (flip.candidate == flip.target)
            assert flip.prompt.endswith("Answer:")
    plain = report.to_json()["candidates"][0]["tasks"]
    assert json.loads(json.dumps(plain))[0]["flips"][0]["item"] == acc.flips[0].item


def test_what_is_answered_is_not_asked_again(world, monkeypatch):
    first = evaluated(world)
    before = lines(world)
    assert len(before) == 2 * len(TASKS) and all(len(set(each)) == len(each) for each in before.values())
    monkeypatch.setattr("quantkit.evaluation.tasks.session.LLM", None)  # no model is loaded
    assert figures(evaluated(world)) == figures(first) and lines(world) == before
    with pytest.raises(TypeError):
        evaluated(world, "tiny_choice", num_fewshot=1)  # other prompts


def test_a_damaged_last_line_is_asked_again(world):
    first = evaluated(world, "tiny_choice")
    before = lines(world)
    for file in before:
        file.write_bytes(file.read_bytes()[:-9])
    assert figures(evaluated(world, "tiny_choice")) == figures(first)
    for file, each in lines(world).items():
        assert each[:-1] == before[file][:-1], "only the last was asked again"
        assert json.loads(each[-1])["request"] == json.loads(before[file][-1])["request"]


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("tiny_choice", {"request": [5]}),
        ("tiny_choice", {"answer": ["-1", True]}),
        ("tiny_text", {"answer": None}),
        ("tiny_writing", {"answer": [-1.0, True]}),
    ],
)
def test_a_line_that_holds_no_answer_is_asked_again(world, task, change):
    first = evaluated(world, task, limit=2)
    before = lines(world)
    for file, (line, *others) in before.items():
        file.write_text("\n".join([json.dumps(json.loads(line) | change), *others, ""]))
    assert figures(evaluated(world, task, limit=2)) == figures(first)
    assert [len(each) for each in lines(world).values()] == [len(each) + 1 for each in before.values()]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_continues(kill, world):
    script = (
        "import signal, sys; from pathlib import Path; from quantkit.evaluation.tasks import library\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background ignores it
        "library.data_dir = lambda name: Path(sys.argv[1]) / name\n"
        "from quantkit.cli.main import run\n"
        "sys.exit(run(sys.argv[2:]))"
    )
    command = [
        "eval",
        str(world / "original"),
        str(world / "candidate"),
        "--tasks",
        "tiny_choice,tiny_writing",
    ]
    command += [
        "--data",
        str(world / "text.txt"),
        "--windows",
        "1",
        "--length",
        "16",
        "--device",
        "cpu",
        "--json",
    ]
    arguments = [sys.executable, "-c", script, str(world), *command]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while sum(map(len, lines(world).values())) < 20 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(kill)
        error = process.communicate()[1]
    assert process.returncode == (-signal.SIGKILL if kill == signal.SIGKILL else 130), error
    partly = lines(world)
    assert 20 <= sum(map(len, partly.values())) < 2 * ITEMS * 4
    again = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    complete = lines(world)
    assert sum(map(len, complete.values())) == 2 * (3 * ITEMS + ITEMS)
    for file, each in complete.items():
        keys = [json.loads(line)["request"] for line in each]
        assert len(set(keys)) == len(keys), "nothing is asked twice"
        assert each[: len(partly.get(file, ()))][:-1] == partly.get(file, [])[:-1]
    found = json.loads(again.stdout)["candidates"][0]["tasks"]
    whole = evaluated(world, "tiny_choice").to_json()["candidates"][0]["tasks"]
    assert found[: len(whole)] == json.loads(json.dumps(whole))
    assert "lm_eval" not in again.stderr and "Warning" not in again.stderr and "it/s" not in again.stderr


def test_a_task_that_nobody_knows(world, capsys):
    options = ["--data", str(world / "text.txt"), "--windows", "1", "--length", "16", "--device", "cpu"]
    models = [str(world / "original"), str(world / "candidate")]
    assert run(["eval", *models, *options, "--tasks", "tiny_choise"]) == 2
    error = capsys.readouterr().err
    assert "tiny_choise" in error and "tiny_choice" in error.splitlines()[-1]


def test_a_task_that_is_in_a_suite_twice_has_one_limit(world):
    again = [TaskRequest(name="tiny", limit=3), TaskRequest(name="tiny_choice", limit=3)]
    assert len(load_tasks(again, say=print)) == len(TASKS)
    with pytest.raises(EvaluationError, match="tiny_choice is asked for twice, differently"):
        load_tasks([*again, TaskRequest(name="tiny_choice", limit=5)], say=print)


def test_data_that_cannot_be_loaded_is_named(world):
    file = world / "eval" / "probes" / "tiny_text.yaml"
    file.write_text(file.read_text().replace("test.jsonl", "gone.jsonl"))
    with pytest.raises(EvaluationError, match="task tiny_text: its dataset json cannot be loaded"):
        evaluated(world, "tiny_text")


def test_code_that_a_model_writes_is_not_run(world):
    file = world / "eval" / "probes" / "tiny_writing.yaml"
    file.write_text(file.read_text() + "unsafe_code: true\n")
    with pytest.raises(EvaluationError, match="tiny_writing runs code"):
        evaluated(world, "tiny_writing")


def test_a_candidate_without_a_chat_template_cannot_be_asked_in_it(world, byte_tokenizer):
    byte_tokenizer.chat_template = None
    (world / "candidate" / "chat_template.jinja").unlink()
    byte_tokenizer.save_pretrained(world / "candidate")
    report = evaluated(world, "tiny_choice", apply_chat_template=True)
    assert "no chat template" in report.candidates[0].failure and not report.passed
    (world / "candidate" / "chat_template.jinja").write_text("another" + TEMPLATE)
    assert (
        "templates differ" in evaluated(world, "tiny_choice", apply_chat_template=True).candidates[0].failure
    )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ messages[0] + 1 }}", "unsupported operand"),
    ],
)
def test_a_candidate_whose_chat_template_fails_cannot_be_asked_in_it(world, template, reason):
    (world / "candidate" / "chat_template.jinja").write_text(template)
    failure = evaluated(world, "tiny_choice", apply_chat_template=True).candidates[0].failure
    assert "candidate: its chat template cannot be used" in failure and reason in failure


def test_answers_of_another_tokenizer_or_other_stop_tokens_are_not_found_again(world, byte_tokenizer):
    """The same weights read other tokens, or stop elsewhere: what the log holds is no answer of theirs."""
    first = evaluated(world, "tiny_choice")
    byte_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    byte_tokenizer.save_pretrained(world / "candidate")
    again = evaluated(world, "tiny_choice")
    assert figures(again) != figures(first)
    assert any("its tokenizer makes '<bos>a' of 'a', the original's 'a'" in note for note in again.notes)
    assert not any("its tokenizer makes" in note for note in first.notes)
    (world / "candidate" / "generation_config.json").write_text('{"eos_token_id": 40}')
    evaluated(world, "tiny_choice")
    assert sum(file.parent.name.startswith("candidate-") for file in lines(world)) == 3


def test_drawn_answers_are_as_many_as_are_asked_for(world):
    file = world / "eval" / "probes" / "tiny_writing.yaml"
    file.write_text(
        file.read_text().replace("do_sample: false", "do_sample: true, temperature: 1.0") + "repeats: 3\n"
    )
    evaluated(world, "tiny_writing", limit=5)
    assert [len(each) for each in lines(world).values()] == [15, 15]


def test_false_alarms_under_noise_of_the_dtype(world, monkeypatch):
    """The original against itself, in bf16 and float32: 200 draws of its items, each pair in random order."""
    monkeypatch.setattr(statistics, "SLOW_RESAMPLES", 200)
    write_tasks(world / "eval" / "probes", num_items=100, seed=1)
    (loaded,) = load_tasks([TaskRequest(name="tiny_cloze")], say=print)
    values = []
    for dtype in ("float32", "bfloat16"):
        llm = LLM(world / "original", dtype=dtype, device="cpu")
        with SampleLog(world / f"{dtype}.jsonl") as log:
            result = run_task(loaded, lambda llm=llm: EngineLM(llm), log, chat=None, say=print)
        values.append(list(result.metrics[0].values.values()))
    values_2N = np.array(values)
    assert result.metrics[0].name == "perplexity" and (values_2N[0] != values_2N[1]).all()
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        chosen, order = rng.integers(100, size=100), rng.integers(2, size=100)
        pairs = values_2N[[order, 1 - order], chosen].tolist()
        found.append(statistics.compare(*pairs, result.metrics[0].aggregate, higher_is_better=False))
    assert sum(one.p_value < 0.05 for one in found) <= binom.ppf(0.999, 200, 0.05)


def test_the_environment_is_left_as_it_was(world):
    before = dict(os.environ)
    evaluated(world, "tiny_choice", limit=2)
    assert dict(os.environ) == before
