"""Our engine as a model of lm-eval: the numbers of lm-eval's own model of transformers, on every kind of task."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit import LLM
from quantkit.errors import EvaluationError
from quantkit.evaluation.suites import TaskRequest
from quantkit.evaluation.tasks.library import load_tasks
from quantkit.evaluation.tasks.run import build_requests
from tests.byte_tokenizer import TEMPLATE
from tests.lm_eval_tasks import TASKS, write_tasks
from tests.product_schemes import SCHEMES
from tests.tiny_models import CONFIGS, quantize_tiny, save_tiny

KINDS = {"tiny_choice": "loglikelihood", "tiny_cloze": "loglikelihood"} | {
    "tiny_text": "loglikelihood_rolling",
    "tiny_writing": "generate_until",
}


@pytest.fixture
def saved(tmp_path, byte_tokenizer, monkeypatch):
    """A tiny Llama over bytes, of at most 200 tokens, with its tokenizer."""
    config = CONFIGS["llama"].to_dict() | {"vocab_size": 260, "max_position_embeddings": 200}
    monkeypatch.setitem(CONFIGS, "bytes", type(CONFIGS["llama"])(**config))
    folder = save_tiny("bytes", tmp_path / "model")
    byte_tokenizer.chat_template = TEMPLATE
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path):
    folder = write_tasks(tmp_path / "tasks")
    return {one.name: one for one in load_tasks([TaskRequest(name="tiny")], say=print, include=[folder])}


def ours(folder, **settings):
    from quantkit.evaluation.tasks.engine_lm import EngineLM

    return EngineLM(LLM(folder, dtype="float32", device="cpu", **settings))


def theirs(folder, byte_tokenizer):
    from quantkit.evaluation.tasks.hf_lm import transformers_lm

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    byte_tokenizer.pad_token = byte_tokenizer.eos_token
    return transformers_lm(model, byte_tokenizer, batch_size=4)


def asked(loaded, chat=None):
    """The kind of a task's requests, and these."""
    ((kind, requests),) = build_requests(loaded, chat).items()
    return kind, requests


def assert_same(found, expected):
    """To 1e-4 of each number, and texts exactly."""
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        if isinstance(other, tuple):
            assert mine == (pytest.approx(other[0], rel=1e-4), other[1])
        else:
            assert mine == (other if isinstance(other, str) else pytest.approx(other, rel=1e-4))


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("name", TASKS)
def test_answers_are_those_of_lm_evals_own_model(name, chat, saved, tasks, byte_tokenizer):
    engine, reference = ours(saved), theirs(saved, byte_tokenizer)
    kind, requests = asked(tasks[name], engine.apply_chat_template if chat else None)
    _, same = asked(tasks[name], reference.apply_chat_template if chat else None)
    assert kind == KINDS[name] and [each.args for each in requests] == [each.args for each in same]
    assert_same(getattr(engine, kind)(requests), getattr(reference, kind)(requests, disable_tqdm=True))


def test_a_quantized_checkpoint_answers_as_in_transformers(saved, tasks, tmp_path, byte_tokenizer):
    folder = quantize_tiny(saved, tmp_path / "quantized", SCHEMES["int8-g32-sym"])
    byte_tokenizer.save_pretrained(folder)
    engine, reference = ours(folder), theirs(folder, byte_tokenizer)
    for name in ("tiny_choice", "tiny_text"):
        kind, requests = asked(tasks[name])
        assert_same(getattr(engine, kind)(requests), getattr(reference, kind)(requests, disable_tqdm=True))


def test_a_full_cache_and_small_steps_change_nothing(saved, tasks):
    _, requests = asked(tasks["tiny_choice"])
    expected = ours(saved).loglikelihood(requests)
    small = ours(saved, max_num_seqs=3, max_num_batched_tokens=19, kv_cache_bytes=1 << 19)
    assert_same(small.loglikelihood(requests), expected)


def test_answers_to_one_question_share_its_tokens(saved, tasks):
    engine = ours(saved)
    _, requests = asked(tasks["tiny_choice"])
    engine.loglikelihood(requests)
    stats = engine._llm.requests.stats
    assert stats.num_prefix_hits > 0.6 * stats.num_prefix_queries


def test_drawn_answers_differ_and_are_the_same_again(saved, tasks):
    engine = ours(saved)
    _, requests = asked(tasks["tiny_writing"])
    for request in requests:
        request.args[1].update(do_sample=True, temperature=1.0, until=[])
    twice = [requests[0]] * 3 + requests[1:]
    found = engine.generate_until(twice)
    assert len(set(found[:3])) == 3 and ours(saved).generate_until(twice) == found


def test_what_the_engine_has_not_is_refused(saved, tasks):
    engine = ours(saved)
    _, requests = asked(tasks["tiny_writing"])
    requests[0].args[1].update(num_beams=4)
    with pytest.raises(EvaluationError, match="num_beams"):
        engine.generate_until(requests)
    requests[0].args[1].pop("num_beams")
    requests[0].args[1]["max_gen_toks"] = 200
    with pytest.raises(EvaluationError, match="max_gen_toks 200"):
        engine.generate_until(requests)
    with pytest.raises(EvaluationError, match="300 tokens"):
        engine._loglikelihood_tokens([(("a", "b"), [1], [5] * 300)])
    engine.tokenizer.chat_template = None
    with pytest.raises(EvaluationError, match="no chat template"):
        engine.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_logits_that_are_no_numbers_are_said_to_be(saved, tasks):
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    engine = ours(saved)
    for name in ("tiny_choice", "tiny_writing"):
        kind, requests = asked(tasks[name])
        with pytest.raises(EvaluationError, match="no numbers"):
            getattr(engine, kind)(requests)
