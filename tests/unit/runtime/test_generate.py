"""Generation end to end on tiny models: against transformers, how it stops, what it refuses; and the verb."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.cli.main import run
from quantkit.errors import GenerationError
from quantkit.runtime.generate import generate
from quantkit.runtime.load import load_model
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.tokenizer import Tokenizer
from tests.tiny_models import CONFIGS, save_tiny, tokens


class Numbers:
    """A tokenizer backend whose tokens read as their number."""

    eos_token_id = None

    @property
    def backend_tokenizer(self):
        return self

    def get_added_tokens_decoder(self):
        return {}

    def decode(self, token_ids, **_):
        return "".join(f"{token} " for token in token_ids)


@pytest.fixture
def numbers(tmp_path):
    return Tokenizer(tmp_path, Numbers())


def ids_of(events):
    return [event.token_id for event in events]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_equals_transformers(name, tmp_path, numbers):
    save_tiny(name, tmp_path)
    prompt = tokens(9).tolist()
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 9, dtype=torch.long),
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 9:].tolist()
    model = load_model(tmp_path, dtype=torch.float32)
    events = list(generate(model, numbers, prompt, SamplingParams(max_tokens=30), stop_ids=frozenset()))
    assert ids_of(events) == expected
    assert "".join(event.text for event in events) == numbers.decode(expected)
    assert [event.finish for event in events] == [None] * 29 + ["length"]


def test_it_stops_at_a_stop_token_and_leaves_its_text_out(tmp_path, numbers):
    model = load_model(save_tiny("llama", tmp_path))
    prompt = tokens(9).tolist()
    free = ids_of(generate(model, numbers, prompt, SamplingParams(max_tokens=10), stop_ids=frozenset()))
    stop = free[4]
    first = free.index(stop)
    events = list(
        generate(model, numbers, prompt, SamplingParams(max_tokens=10), stop_ids=frozenset({96, stop}))
    )
    if 96 not in free[: first + 1]:
        assert ids_of(events) == free[: first + 1]
    assert events[-1].finish == "stop"
    assert "".join(event.text for event in events) == numbers.decode(ids_of(events)[:-1])


def test_it_stops_where_the_context_ends(tmp_path, numbers):
    model = load_model(save_tiny("llama", tmp_path))
    events = list(
        generate(model, numbers, tokens(60).tolist(), SamplingParams(max_tokens=50), stop_ids=frozenset())
    )
    assert len(events) == 4
    assert events[-1].finish == "context"


@pytest.mark.parametrize("length", [64, 100])
def test_a_prompt_that_fills_the_context_is_refused(length, tmp_path, numbers):
    model = load_model(save_tiny("llama", tmp_path))
    with pytest.raises(GenerationError, match=f"{length} tokens, and the model takes 64") as caught:
        next(generate(model, numbers, tokens(length).tolist(), SamplingParams(), stop_ids=frozenset()))
    assert "shorten" in caught.value.fix


def test_a_seed_repeats_the_answer(tmp_path, numbers):
    model = load_model(save_tiny("llama", tmp_path))

    def answer(seed):
        params = SamplingParams(max_tokens=15, temperature=1.5, top_k=40, seed=seed)
        return ids_of(generate(model, numbers, tokens(5).tolist(), params, stop_ids=frozenset()))

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


@pytest.mark.parametrize(
    ("ids", "finding"), [([1, 97], "97 is outside"), ([-1, 3], "-1 is outside"), ([], "no tokens")]
)
def test_token_ids_that_the_model_has_not(ids, finding, tmp_path):
    model = load_model(save_tiny("llama", tmp_path))
    with pytest.raises(GenerationError, match=finding):
        model.logits(torch.tensor(ids, dtype=torch.int64))


def test_a_text_longer_than_the_context_has_no_logits(tmp_path):
    model = load_model(save_tiny("llama", tmp_path))
    with pytest.raises(GenerationError, match="65 tokens, but the model was made for at most 64"):
        model.logits(tokens(65))


@pytest.fixture
def saved(tmp_path, byte_tokenizer, monkeypatch):
    """A tiny Llama over bytes with its tokenizer, as a folder."""
    monkeypatch.setitem(CONFIGS, "bytes", _with_vocab(CONFIGS["llama"], 260))
    folder = save_tiny("bytes", tmp_path / "model", dtype=torch.bfloat16)
    byte_tokenizer.save_pretrained(folder)
    return folder


def _with_vocab(config, size):
    return type(config)(**{**config.to_dict(), "vocab_size": size})


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
    line = [
        "generate",
        str(saved),
        "Hi",
        "--max-tokens",
        "9",
        "--temperature",
        "1.2",
        "--top-k",
        "50",
        "--top-p",
        "0.95",
    ]
    line += ["--min-p", "0.01", "--json"]
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


def test_the_options_default_to_the_sampling_params():
    from quantkit.cli.generate import generate as verb

    for field in dataclasses.fields(SamplingParams):
        if field.name not in verb.__code__.co_varnames:
            continue  # not an option of this verb
        assert verb.__defaults__ is not None
        parameter = dict(
            zip(
                reversed(verb.__code__.co_varnames[: verb.__code__.co_argcount]),
                reversed(verb.__defaults__),
                strict=False,
            )
        )
        assert parameter[field.name] == field.default
