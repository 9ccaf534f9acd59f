"""`LLM` on a tiny model over bytes: texts, conversations, streams, what is left after an interrupt; and the verbs."""

import dataclasses
import inspect
import io
import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import LLM, SamplingParams
from quantkit.cli.chat import chat as chat_verb
from quantkit.cli.generate import generate as generate_verb
from quantkit.cli.main import INTERRUPTED, run
from quantkit.errors import GenerationError
from quantkit.runtime import start
from quantkit.runtime.settings import EngineSettings
from quantkit.runtime.tokenizer import Tokenizer
from tests.byte_tokenizer import TEMPLATE
from tests.tiny_models import CONFIGS, save_tiny

PROMPTS = ["Hi", "What is this?", "x" * 30]


@pytest.fixture
def saved(tmp_path, byte_tokenizer, monkeypatch):
    """A tiny Llama over bytes with its tokenizer, as a folder."""
    config = CONFIGS["llama"]
    monkeypatch.setitem(CONFIGS, "bytes", type(config)(**{**config.to_dict(), "vocab_size": 260}))
    folder = save_tiny("bytes", tmp_path / "model", dtype=torch.bfloat16)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def talking(saved, byte_tokenizer):
    """The same with a chat template."""
    byte_tokenizer.chat_template = TEMPLATE
    byte_tokenizer.save_pretrained(saved)
    return saved


def load(folder, **settings):
    return LLM(folder, **({"dtype": "float32", "device": "cpu", "max_num_seqs": 4} | settings))


def texts(outputs):
    return [[answer.text for answer in output.outputs] for output in outputs]


def test_many_prompts_equal_one_by_one_in_their_order(saved):
    llm = load(saved)
    params = SamplingParams(max_tokens=12)
    alone = [llm.generate(prompt, params)[0] for prompt in PROMPTS]
    together = llm.generate(PROMPTS, params)
    assert texts(together) == texts(alone)
    assert [output.prompt for output in together] == PROMPTS
    assert all(len(output.outputs[0].token_ids) == 12 and output.finished for output in together)


def test_token_ids_and_parameters_for_each(saved):
    llm = load(saved)
    ids = llm.tokenizer.encode_prompt("Hi", raw=True)
    short, long = (SamplingParams(max_tokens=count) for count in (3, 5))
    outputs = llm.generate([ids, ids], [short, long])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 5]
    assert llm.generate(ids, short)[0].outputs[0].token_ids == outputs[0].outputs[0].token_ids
    with pytest.raises(ValueError, match="1 sampling_params for 2 prompts"):
        llm.generate(PROMPTS[:2], [short])


def test_a_stream_joins_to_the_whole(saved):
    llm = load(saved)
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3)
    whole = llm.generate("Hi", params)[0].outputs[0]
    pieces = list(llm.stream("Hi", params))
    assert "".join(piece.outputs[0].text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.outputs[0].token_ids] == whole.token_ids
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_streams_and_answers_do_not_mix(saved):
    llm = load(saved)
    params = SamplingParams(max_tokens=10)
    alone = [llm.generate(prompt, params)[0].outputs[0].text for prompt in PROMPTS]
    first, second = (llm.stream(prompt, params) for prompt in PROMPTS[:2])
    pieces = [[next(first)], [next(second)]]
    assert texts(llm.generate(PROMPTS[2], params)) == [[alone[2]]]
    for stream, into in ((second, pieces[1]), (first, pieces[0])):
        into += stream
    assert ["".join(piece.outputs[0].text for piece in each) for each in pieces] == alone[:2]


def test_threads_get_the_answers_that_one_alone_gets(saved):
    llm = load(saved)
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=3, ignore_eos=True)
    prompts = [f"{number} {text}" for number in range(4) for text in PROMPTS]
    alone = texts(llm.generate(prompts, params))

    def streamed(prompt):
        return ["".join(piece.outputs[0].text for piece in llm.stream(prompt, params))]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda prompt: texts(llm.generate(prompt, params))[0], prompts)) == alone
        assert list(threads.map(streamed, prompts)) == alone
    assert not llm._ready and not llm.requests.has_work


def test_logprobs_are_as_many_as_were_asked_for_in_any_company(saved):
    llm = load(saved)
    asked = [SamplingParams(max_tokens=3, logprobs=count) for count in (1, 8, 0)]
    outputs = llm.generate(PROMPTS, [*asked])
    alone = [llm.generate(prompt, params)[0] for prompt, params in zip(PROMPTS, asked, strict=True)]
    for together, by_itself in zip(outputs, alone, strict=True):
        found, expected = together.outputs[0].logprobs, by_itself.outputs[0].logprobs
        assert [list(each) for each in found] == [list(each) for each in expected]


def test_a_stream_that_is_left_leaves_nothing(saved):
    llm = load(saved)
    for _ in llm.stream("Hi", SamplingParams(max_tokens=40)):
        break
    assert not llm.started.engine.scheduler.has_unfinished
    assert not llm.requests._sequences
    assert llm.started.engine.scheduler.stats.kv_usage == 0


def test_an_interrupt_ends_every_request(saved, monkeypatch):
    llm = load(saved)
    step, count = llm.started.engine.step, iter(range(99))

    def interrupted():
        if next(count) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.started.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, SamplingParams(max_tokens=20))
    assert not llm.started.engine.scheduler.has_unfinished
    monkeypatch.setattr(llm.started.engine, "step", step)
    assert llm.generate("Hi", SamplingParams(max_tokens=2))[0].finished


def interrupt_at(num_lines):
    """A trace function that raises KeyboardInterrupt once, at this line that is executed inside the runtime."""
    lines = itertools.count(1)

    def trace(frame, event, argument):
        if f"quantkit{os.sep}runtime" not in frame.f_code.co_filename or frame.f_code.co_name == "_reset":
            return None
        if event == "line" and next(lines) == num_lines:
            raise KeyboardInterrupt
        return trace

    return trace


def test_an_interrupt_at_any_line_leaves_nothing(saved):
    llm = load(saved)
    params = SamplingParams(max_tokens=12, frequency_penalty=0.1, stop="zzz")
    expected = texts(llm.generate(PROMPTS * 2, params))
    scheduler = llm.started.engine.scheduler
    num_interrupted = 0
    for num_lines in range(50, 700, 20):
        sys.settrace(interrupt_at(num_lines))
        try:
            llm.generate(PROMPTS * 2, params)
        except KeyboardInterrupt:
            num_interrupted += 1
        finally:
            sys.settrace(None)
        assert not llm.requests.has_work and not llm.requests._sequences, num_lines
        assert scheduler.stats.kv_usage == 0 and len(scheduler._free_rows) == 4, num_lines
    assert num_interrupted > 30
    assert texts(llm.generate(PROMPTS * 2, params)) == expected


def test_who_waits_for_what_an_interrupt_ended_is_told(saved, monkeypatch):
    llm = load(saved)
    stream = llm.stream("Hi", SamplingParams(max_tokens=40, ignore_eos=True))
    next(stream)
    with monkeypatch.context() as patched:
        patched.setattr(llm.started.engine.scheduler, "launched", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("What", SamplingParams(max_tokens=4))
    with pytest.raises(GenerationError, match="an interrupt of another request"):
        list(stream)
    assert llm.generate("What", SamplingParams(max_tokens=4))[0].finished


def interrupted(*_):
    raise KeyboardInterrupt


def test_n_answers_have_seeds_of_their_own_and_one_prompt(saved):
    llm = load(saved)
    params = SamplingParams(n=3, max_tokens=8, temperature=1.5, seed=1)
    answers = llm.generate("x" * 33, params)[0].outputs
    assert [answer.index for answer in answers] == [0, 1, 2]
    assert len({answer.text for answer in answers}) == 3
    assert llm.started.engine.scheduler.stats.num_prefix_hits == 2 * 32


def test_a_stop_string_ends_the_answer_in_text_and_engine(saved):
    llm = load(saved)
    free = llm.generate("Hi", SamplingParams(max_tokens=30))[0].outputs[0].text
    stop = free[6:9]
    found = llm.generate("Hi", SamplingParams(max_tokens=30, stop=[stop]))[0].outputs[0]
    assert found.text == free[: free.index(stop)]
    assert (found.finish_reason, found.stop_reason) == ("stop", stop)
    assert not llm.requests.has_work


def test_what_cannot_be_answered_is_refused_and_the_rest_goes_on(saved):
    llm = load(saved)
    with pytest.raises(GenerationError, match="64 tokens"):
        llm.generate(["Hi", "x" * 64], SamplingParams(max_tokens=4))
    with pytest.raises(GenerationError, match="no token 260"):
        llm.generate("Hi", SamplingParams(stop_token_ids=(260,)))
    with pytest.raises(GenerationError, match="300 is no token of the model, which has 260"):
        llm.generate([[1, 300]], SamplingParams())
    with pytest.raises(GenerationError, match="-1 is no token"):
        llm.generate([[1, -1]], SamplingParams())
    with pytest.raises(GenerationError, match="no chat template"):
        llm.chat([{"role": "user", "content": "Hi"}])
    assert not llm.requests.has_work
    assert llm.generate("Hi", SamplingParams(max_tokens=2))[0].finished


def test_smaller_priorities_are_served_first(saved):
    llm = load(saved, max_num_seqs=1)
    params = SamplingParams(max_tokens=4, n=2)
    order = []
    step = llm.requests._engine.step

    def watched():
        events = step()
        order.extend(event.sequence.priority for event in events if event.finish)
        return events

    llm.requests._engine.step = watched
    plain = texts(llm.generate(PROMPTS, params))
    assert order == [0] * 6
    order.clear()
    assert texts(llm.generate(PROMPTS, params, priority=[2, 0, 1])) == plain
    assert order == [0, 0, 1, 1, 2, 2]
    order.clear()
    assert list(llm.stream("Hi", params, priority=-3))
    assert order == [-3, -3]


def test_priorities_are_one_for_all_or_for_each(saved):
    llm = load(saved)
    params = SamplingParams(max_tokens=2)
    assert len(llm.generate(PROMPTS, params, priority=3)) == 3
    with pytest.raises(ValueError, match="2 priority for 3 prompts"):
        llm.generate(PROMPTS, params, priority=[1, 2])
    with pytest.raises(GenerationError, match=r"priority 0\.5"):
        llm.generate(PROMPTS, params, priority=0.5)
    assert not llm.requests._engine.has_work


def test_every_option_changes_an_answer_streamed_or_whole(saved):
    llm = load(saved)
    free = llm.generate("Hi", SamplingParams(max_tokens=12))[0].outputs[0]
    hot = {"temperature": 2.0, "seed": 1}
    ends, speaks = (
        {"logit_bias": {min(llm.requests._eos_ids): 100.0}},
        {"logit_bias": {2: 100.0}, "ignore_eos": True},
    )
    cases = {  # without, with
        "n": ({}, {"n": 2}),
        "max_tokens": ({}, {"max_tokens": 5}),
        "min_tokens": (ends, ends | {"min_tokens": 3}),
        "temperature": ({"seed": 1}, hot),
        "top_p": (hot, hot | {"top_p": 0.01}),
        "top_k": (hot, hot | {"top_k": 1}),
        "min_p": (hot, hot | {"min_p": 0.9}),
        "seed": (hot, hot | {"seed": 2}),
        "stop": ({}, {"stop": free.text[4:6]}),
        "stop_token_ids": ({}, {"stop_token_ids": (free.token_ids[5],)}),
        "ignore_eos": (ends, ends | {"ignore_eos": True}),
        "presence_penalty": (hot, hot | {"presence_penalty": 2.0, "logit_bias": {70: 20.0}}),
        "frequency_penalty": (
            {"logit_bias": {70: 20.0}},
            {"logit_bias": {70: 20.0}, "frequency_penalty": 2.0},
        ),
        "repetition_penalty": (
            {"logit_bias": {70: 20.0}},
            {"logit_bias": {70: 20.0}, "repetition_penalty": 100.0},
        ),
        "logit_bias": ({}, {"logit_bias": {70: 100.0}}),
        "logprobs": ({}, {"logprobs": 2}),
        "include_stop_str_in_output": (
            {"stop": free.text[4:6]},
            {"stop": free.text[4:6], "include_stop_str_in_output": True},
        ),
        "skip_special_tokens": (speaks, speaks | {"skip_special_tokens": False}),
        "structured_outputs": ({}, {"structured_outputs": {"choice": ["yes", "no"]}}),
    }
    of_prompts = {"prompt_logprobs", "prompt_logprobs_start"}  # these change no answer
    assert cases.keys() | of_prompts == {field.name for field in dataclasses.fields(SamplingParams)}
    for name, (without, given) in cases.items():
        for answers in (whole_answers, streamed_answers):
            plain, changed = (
                answers(llm, SamplingParams(**{"max_tokens": 12} | chosen)) for chosen in (without, given)
            )
            assert plain != changed, (name, answers)


def whole_answers(llm, params):
    """Of each answer: text, tokens, why it ended, how many logprobs there are."""
    return [
        (one.text, one.token_ids, one.finish_reason, one.stop_reason, len(one.logprobs or ()))
        for one in llm.generate("Hi", params)[0].outputs
    ]


def streamed_answers(llm, params):
    """The same, put together from pieces."""
    joined = {}
    for piece in llm.stream("Hi", params):
        for new in piece.outputs:
            text, token_ids, *_, count = joined.get(new.index, ("", [], None, None, 0))
            joined[new.index] = (
                text + new.text,
                token_ids + new.token_ids,
                new.finish_reason,
                new.stop_reason,
                count + len(new.logprobs or ()),
            )
    assert list(joined[0]) == list(whole_answers(llm, params)[0])
    return list(joined.values())


FULL = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB"


class FullRunner:
    """A GPU, whose results come a step late, without memory for more than one sequence."""

    is_async = True

    def __init__(self, runner):
        self._runner = runner

    def launch(self, plan):
        in_flight = self._runner.launch(plan)
        if len(plan.rows) > 1:
            raise torch.OutOfMemoryError(FULL)  # having begun
        return in_flight


def test_a_step_that_finds_no_memory_names_the_options_and_others_go_on(saved):
    llm = load(saved)
    params = SamplingParams(max_tokens=10)
    alone = texts(llm.generate(prompt, params)[0] for prompt in PROMPTS)
    runner = llm.requests._engine._runner
    llm.requests._engine._runner = FullRunner(runner)
    stream = llm.stream(PROMPTS[0], params)
    pieces = [next(stream), next(stream)]
    with pytest.raises(
        GenerationError, match=r"a step of \d+ tokens: CUDA out of memory; Tried to all"
    ) as error:
        llm.generate(PROMPTS[1], params)
    for option in ("gpu_memory_fraction", "max_num_batched_tokens", "max_model_len"):
        assert option in error.value.fix
    pieces += stream
    assert "".join(piece.outputs[0].text for piece in pieces) == alone[0][0]
    assert not llm.requests._engine.has_work and llm.requests._engine.scheduler.stats.kv_usage == 0
    llm.requests._engine._runner = runner
    assert texts(llm.generate(PROMPTS, params)) == alone


def test_loading_that_finds_no_memory_names_the_options(saved, monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(start, "load_model", fails)
    with pytest.raises(GenerationError, match="loading the model: CUDA out of memory") as error:
        load(saved)
    assert "gpu_memory_fraction" in error.value.fix


def test_a_conversation_goes_through_the_template(talking):
    llm = load(talking)
    params = SamplingParams(max_tokens=6)
    message = {"role": "user", "content": "Hi"}
    answer = llm.chat([message], params)[0]
    assert answer.prompt_token_ids == llm.tokenizer.encode_prompt("Hi", raw=False)
    assert texts(llm.chat([[message], [message]], params)) == [texts([answer])[0]] * 2


def test_settings_that_make_no_sense(saved):
    with pytest.raises(TypeError, match="max_tokens"):
        load(saved, max_tokens=3)
    with pytest.raises(GenerationError, match="kv_cache_dtype 'int4'"):
        load(saved, kv_cache_dtype="int4")
    with pytest.raises(GenerationError, match="device 'tpu'"):
        load(saved, device="tpu")
    with pytest.raises(GenerationError, match="65 tokens for a model that was made for at most 64"):
        load(saved, max_model_len=65)
    with pytest.raises(GenerationError, match="the KV cache holds"):
        load(saved, max_model_len=64, kv_cache_bytes=1000)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("prefix_caching", "off"),
        ("batch_invariant", None),
        ("eager", 1),
        ("gpu_memory_fraction", "x"),
        ("gpu_memory_fraction", True),
        ("gpu_memory_fraction", 1.5),
    ],
)
def test_settings_of_the_wrong_kind(setting, value):
    with pytest.raises(GenerationError, match=f"{setting} {value!r}"):
        EngineSettings(**{setting: value})


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "int8"])
def test_a_quantized_cache_is_the_same_cold_cached_and_chunked(saved, kv_cache_dtype):
    params = SamplingParams(max_tokens=12)
    llm = load(saved, kv_cache_dtype=kv_cache_dtype)
    cold = texts(llm.generate(PROMPTS, params))
    assert texts(llm.generate(PROMPTS, params)) == cold
    chunked = load(saved, kv_cache_dtype=kv_cache_dtype, max_num_seqs=1, max_num_batched_tokens=17)
    assert texts(chunked.generate(PROMPTS, params)) == cold


def test_the_package_gives_its_names_when_asked():
    assert quantkit.LLM is LLM
    assert quantkit.SamplingParams is SamplingParams


def test_the_verb_streams_text_to_stdout_and_speed_to_stderr(saved, capfd):
    assert run(["generate", str(saved), "Hi", "--max-tokens", "12", "--raw"]) == 0
    captured = capfd.readouterr()
    assert captured.out.endswith("\n")
    assert "2 prompt tokens" in captured.err
    assert "tok/s; --max-tokens reached" in captured.err


def test_the_verb_with_json_prints_one_object_and_the_same_text(saved, capfd):
    line = ["generate", str(saved), "Hi", "--max-tokens", "12", "--dtype", "float32"]
    assert run(line) == 0
    text = capfd.readouterr().out
    assert run([*line, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["text"] + "\n" == text
    assert len(report["token_ids"]) == 12
    assert report["finish"] == "length"
    assert report["prompt_tokens"] == 2


def test_the_verb_samples_with_a_seed(saved, capfd):
    line = ["generate", str(saved), "Hi", "--max-tokens", "9", "--temperature", "1.2", "--top-k", "50"]
    line += ["--top-p", "0.95", "--min-p", "0.01", "--repetition-penalty", "1.1", "--json"]
    outputs = []
    for seed in ("1", "1", "2"):
        assert run([*line, "--seed", seed]) == 0
        outputs.append(json.loads(capfd.readouterr().out)["token_ids"])
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize(
    ("arguments", "finding"),
    [
        (["--temperature", "-1"], "temperature -1"),
        (["--top-p", "0"], "top_p 0"),
        (["--max-tokens", "0"], "max_tokens 0"),
        (["--dtype", "int4"], "dtype"),
        (["--kv-cache-dtype", "int4"], "kv-cache-dtype"),
        (["--device", "tpu"], "device 'tpu'"),
        (["--max-model-len", "65"], "65 tokens"),
    ],
)
def test_the_verb_refuses_settings_that_make_no_sense(arguments, finding, saved, capfd):
    assert run(["generate", str(saved), "Hi", *arguments]) == 2
    assert finding in capfd.readouterr().err


def test_the_verb_refuses_an_empty_and_an_endless_prompt(saved, capfd):
    assert run(["generate", str(saved), ""]) == 2
    assert "no tokens" in capfd.readouterr().err
    assert run(["generate", str(saved), "x" * 64]) == 2
    captured = capfd.readouterr()
    assert "64 tokens" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("verb", [generate_verb, chat_verb])
def test_options_default_to_the_parameters_and_settings(verb):
    options = inspect.signature(verb).parameters
    for field in (*dataclasses.fields(SamplingParams), *dataclasses.fields(EngineSettings)):
        if field.name in options and (verb, field.name) not in [
            (chat_verb, "max_tokens"),
            (generate_verb, "stop"),
        ]:
            assert options[field.name].default == field.default


def say(monkeypatch, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_chat_remembers_until_it_is_reset(talking, monkeypatch, capfd):
    line = ["chat", str(talking), "--max-tokens", "6", "--dtype", "float32"]
    say(monkeypatch, "Hi", "Hi", "/reset", "Hi", "", "/exit", "never")
    assert run(line) == 0
    captured = capfd.readouterr()
    answers = captured.out.split("\n")
    summaries = [summary for summary in captured.err.splitlines() if "prompt tokens" in summary]
    counts = [int(summary.split()[0]) for summary in summaries]
    assert len(counts) == 3
    assert counts[0] == counts[2] < counts[1]
    assert answers[0] == answers[2]


def test_chat_ends_with_its_input_and_says_when_the_context_is_full(talking, monkeypatch, capfd):
    say(monkeypatch, "x" * 70, "Hi")
    assert run(["chat", str(talking), "--max-tokens", "6"]) == 0
    captured = capfd.readouterr()
    assert "begin anew with /reset" in captured.err
    assert "prompt tokens" in captured.err


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(talking, monkeypatch, capfd):
    stream = LLM.stream

    def interrupted(self, *arguments):
        yield next(stream(self, *arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream", interrupted)
    say(monkeypatch, "Hi", "Hi")
    assert run(["chat", str(talking), "--max-tokens", "6"]) == 0
    assert capfd.readouterr().err.count("1 new; stopped") == 2


def test_ctrl_c_before_an_answer_ends_the_conversation(talking, monkeypatch):
    load, calls = Tokenizer.encode_chat, iter(range(9))

    def interrupted(self, messages):
        if next(calls) == 1:  # the first asks whether there is a template
            raise KeyboardInterrupt
        return load(self, messages)

    monkeypatch.setattr(Tokenizer, "encode_chat", interrupted)
    say(monkeypatch, "Hi")
    assert run(["chat", str(talking), "--max-tokens", "6"]) == INTERRUPTED


def test_chat_goes_on_after_a_line_that_is_refused(talking, monkeypatch, capfd):
    say(monkeypatch, "\ud800", "Hi")
    assert run(["chat", str(talking), "--max-tokens", "6"]) == 0
    captured = capfd.readouterr()
    assert "not UTF-8" in captured.err
    assert "prompt tokens" in captured.err


def test_logits_that_are_no_numbers_are_an_error(saved, capfd):
    file = saved / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.nan)
    save_file(tensors, file, metadata={"format": "pt"})
    assert run(["generate", str(saved), "Hi"]) == 2
    assert "not numbers" in capfd.readouterr().err


def test_chat_needs_a_template(saved, monkeypatch, capfd):
    say(monkeypatch, "Hi")
    assert run(["chat", str(saved)]) == 2
    assert "no chat template" in capfd.readouterr().err
