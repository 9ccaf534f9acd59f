"""Grammars: whatever a random model writes is what was asked for, and nobody else in the batch notices."""

import json
import random

import pytest
import torch
from llguidance import LLParserLimits

from quantkit import LLM, SamplingParams, StructuredOutputsParams
from quantkit.errors import GenerationError
from quantkit.runtime import grammar
from quantkit.runtime.grammar import GrammarCompiler, problem_of
from quantkit.runtime.masks import Masks, masked
from quantkit.runtime.structured_outputs import MAX_GRAMMAR_CHARS, MAX_SCHEMA_DEPTH, json_rule
from quantkit_kernels.paged_kv import BLOCK_SIZE
from tests.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from tests.tiny_chat import save_tiny_chat

KINDS = ("string", "integer", "number", "boolean", "null", "enum", "array", "object")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_chat(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def llm(folder):
    return load(folder)


def load(folder, **settings):
    return LLM(folder, **({"dtype": "float32", "device": "cpu", "max_num_seqs": 8} | settings))


def structured(wanted, **params):
    chosen = {"max_tokens": 2000, "temperature": 1.0, "seed": 1} | params
    return SamplingParams(structured_outputs=StructuredOutputsParams(**wanted), **chosen)


def random_schema(random, depth=0):
    """One whose answers are short, however they are drawn."""
    kind = random.choice(KINDS if depth < 3 else KINDS[:-2])
    match kind:
        case "enum":
            return {"enum": random.sample(["é", "a b", 'a"', "\\", "", 1, -2.5, None, True], 3)}
        case "string":
            return random.choice(
                [{"type": "string", "maxLength": 5}, {"type": "string", "pattern": "^[ab]{2,4}$"}]
            )
        case "integer":
            return {"type": "integer", "minimum": random.randint(-50, 0), "maximum": random.randint(0, 5000)}
        case "number":
            return {"type": "number", "minimum": -3, "maximum": random.randint(0, 90)}
        case "array":
            return {"type": "array", "items": random_schema(random, depth + 1), "maxItems": 3}
        case "object":
            names = random.sample(["a", "b c", "ü", "long_name", "x-y"], random.randint(1, 4))
            return {
                "type": "object",
                "properties": {name: random_schema(random, depth + 1) for name in names},
                "required": random.sample(names, random.randint(0, len(names))),
                "additionalProperties": False,
            }
        case _:
            return {"type": kind}


def is_valid(value, schema):
    """By the rules of JSON schema that `random_schema` uses."""
    if "enum" in schema:
        return any(value == each and type(value) is type(each) for each in schema["enum"])
    match schema["type"]:
        case "string":
            letters = set(value) <= set("ab") and 2 <= len(value) <= 4
            return isinstance(value, str) and (letters if "pattern" in schema else len(value) <= 5)
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "number":
            return type(value) in (int, float) and schema["minimum"] <= value <= schema["maximum"]
        case "boolean":
            return type(value) is bool
        case "null":
            return value is None
        case "array":
            return len(value) <= schema["maxItems"] and all(is_valid(each, schema["items"]) for each in value)
        case "object":
            fields = schema["properties"]
            are_known = set(schema["required"]) <= set(value) <= set(fields)
            return are_known and all(is_valid(each, fields[name]) for name, each in value.items())


def test_every_answer_is_valid_under_its_schema(llm):
    generator = random.Random(5)
    schemas = [random_schema(generator) for _ in range(50)]
    params = [structured({"json": schema}, seed=number) for number, schema in enumerate(schemas)]
    outputs = llm.generate(["Hi"] * 50, params)
    for schema, output in zip(schemas, outputs, strict=True):
        assert output.outputs[0].finish_reason == "stop", schema
        assert is_valid(json.loads(output.outputs[0].text), schema), (schema, output.outputs[0].text)


@pytest.mark.parametrize(
    ("wanted", "is_fine"),
    [
        ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
        ({"regex": "[a-c]{3}-[0-9]+"}, lambda text: text[3] == "-" and text[4:].isdecimal()),
        ({"choice": ("yes", 'n"o', "€")}, lambda text: text in ("yes", 'n"o', "€")),
        (
            {"grammar": 'start: "a" ("b" | "c")~3\n'},
            lambda text: text[0] == "a" and set(text[1:]) <= set("bc"),
        ),
    ],
)
def test_every_kind_of_output(llm, wanted, is_fine):
    ends = [1, *llm.tokenizer.encode_prompt('"}', raw=True)]
    params = structured(wanted, n=8, logit_bias=dict.fromkeys(ends, 5))  # to its end soon
    for answer in llm.generate("Hi", params)[0].outputs:
        assert answer.finish_reason == "stop" and is_fine(answer.text)


def test_others_in_the_batch_are_what_they_are_alone(folder):
    free = [SamplingParams(max_tokens=30, temperature=t, seed=3, logprobs=2) for t in (0.0, 1.0)]
    alone = [load(folder, batch_invariant=True).generate("Hi", each)[0].outputs[0] for each in free]
    guided = structured({"json": {"type": "string"}}, max_tokens=40)
    together = load(folder, batch_invariant=True).generate(["Hi"] * 4, [guided, free[0], guided, free[1]])
    for before, after in zip(alone, (together[1], together[3]), strict=True):
        assert after.outputs[0].token_ids == before.token_ids
        assert after.outputs[0].cumulative_logprob == before.cumulative_logprob


def test_the_same_with_few_rows_and_few_blocks(folder):
    """One at a time, preempted, in chunks: the same answers, since the grammar goes where the sequence goes."""
    params = [
        structured(
            {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 12}},
            seed=seed,
            max_tokens=60,
        )
        for seed in range(6)
    ]
    prompts = ["x" * 30] * 3 + ["y" * 20] * 3
    roomy = load(folder).generate(prompts, params)
    block_bytes = BLOCK_SIZE * load(folder).started.model.kv.token_bytes
    tight = load(folder, max_model_len=6 * BLOCK_SIZE, max_num_seqs=4, kv_cache_bytes=8 * block_bytes)
    outputs = tight.generate(prompts, params)
    assert tight.requests.stats.num_preemptions > 0
    assert [each.outputs[0].text for each in outputs] == [each.outputs[0].text for each in roomy]


def test_answers_differ_by_seed_and_a_seed_repeats(llm):
    params = structured({"json": {"type": "string", "maxLength": 8}}, n=4)
    texts = [answer.text for answer in llm.generate("Hi", params)[0].outputs]
    assert len(set(texts)) > 1
    assert [answer.text for answer in llm.generate("Hi", params)[0].outputs] == texts


def test_a_stop_string_and_max_tokens_end_it_before_it_is_complete(llm):
    wanted = {"json": {"const": "abcdefgh"}}
    stopped, cut = llm.generate(
        ["Hi"] * 2, [structured(wanted, stop="def"), structured(wanted, max_tokens=5)]
    )
    assert (stopped.outputs[0].text, stopped.outputs[0].finish_reason) == ('"abc', "stop")
    assert (cut.outputs[0].text, cut.outputs[0].finish_reason) == ('"abcd', "length")


def test_an_ended_request_leaves_nothing(folder):
    llm = load(folder)
    for number, output in enumerate(llm.stream("Hi", structured({"json": {"type": "string"}}))):
        assert not output.finished
        if number == 3:
            break
    assert not llm.requests.has_work and llm.requests.stats.kv_usage == 0
    assert not llm.requests._matchers._guided


def test_a_grammar_that_takes_too_much_ends_its_answer_alone(folder, monkeypatch):
    limits = LLParserLimits(max_lexer_states=60, verbose_errors=False)
    monkeypatch.setattr(grammar, "LIMITS", limits)
    llm = load(folder)
    free = SamplingParams(max_tokens=20)
    alone = llm.generate("Hi", free)[0].outputs[0].text
    lost, other = llm.generate(["Hi", "Hi"], [structured({"regex": "[a-z]{300}"}), free])
    assert lost.outputs[0].finish_reason == "grammar"
    assert 0 < len(lost.outputs[0].text) < 300
    assert other.outputs[0].text == alone
    assert llm.requests.stats.kv_usage == 0 and not llm.requests._matchers._guided


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ({}, "not exactly one"),
        ({"json_object": True, "regex": "a"}, "not exactly one"),
        ({"json": "{"}, "no JSON"),
        ({"json": "[]"}, "is an object"),
        ({"json": {"description": "x" * MAX_GRAMMAR_CHARS}}, "characters"),
        ({"regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, "characters"),
    ],
)
def test_what_is_refused_before_anything_is_compiled(wanted, problem):
    with pytest.raises(GenerationError, match=problem):
        structured(wanted)


def test_a_schema_may_be_so_deep(llm):
    schema = {"type": "integer"}
    while True:
        try:
            params = structured({"json": schema})
        except GenerationError as error:
            assert f"{MAX_SCHEMA_DEPTH} deep" in error.problem
            break
        schema = {"type": "array", "items": schema, "maxItems": 1}
    assert llm.generate("Hi", structured({"json": schema["items"]}))[0].outputs[0].finish_reason == "stop"
    assert params


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ({"json": {"not": {"type": "string"}}}, "not"),
        ({"json": {"$ref": "http://example.com/schema"}}, "example.com"),
        ({"json": {"type": "object", "required": ["a"], "properties": {"a": False}}}, "unsatisfiable|cannot"),
        ({"json": {"$ref": "#"}}, "cannot be followed: no answer fits it"),
        ({"json": False}, "nothing is valid"),
        ({"json": {"pattern": "("}}, "cannot be followed"),
        ({"regex": "("}, "cannot be followed"),
        ({"grammar": "start: ("}, "cannot be followed"),
    ],
)
def test_what_cannot_be_compiled_is_refused_and_nothing_is_left(llm, wanted, problem):
    with pytest.raises(GenerationError, match=problem):
        llm.generate("Hi", structured(wanted))
    assert not llm.requests.has_work


def test_a_lenient_schema_leaves_out_what_cannot_be_enforced():
    schema = {"type": "object", "not": {"type": "string"}}
    assert problem_of(f"start: {json_rule(schema, is_lenient=True)}") is None
    assert "not" in problem_of(f"start: {json_rule(schema)}")


@pytest.mark.parametrize("params", [{"min_tokens": 1}, {"ignore_eos": True}])
def test_it_ends_where_the_grammar_says(params):
    with pytest.raises(GenerationError, match="structured_outputs"):
        structured({"json_object": True}, **params)


def test_masks_leave_the_other_rows_as_they_are():
    """Over more rows than are masked at once, and tokens that fill no word."""
    logits_BV = torch.randn(80, 77, dtype=torch.bfloat16)
    before_BV = logits_BV.clone()
    is_allowed = torch.rand(40, 96) < 0.5
    bits = (is_allowed.view(40, 3, 32).long() << torch.arange(32)).sum(2)
    words = torch.where(bits >= 2**31, bits - 2**32, bits).int()
    rows = [words[row // 2] if row % 2 else None for row in range(80)]
    result_BV = masked(logits_BV, Masks.of(rows, torch.device("cpu")))
    assert torch.equal(logits_BV, before_BV)
    assert torch.equal(result_BV[0::2], before_BV[0::2])
    expected_BV = before_BV[1::2].masked_fill(~is_allowed[:, :77], -torch.inf)
    assert torch.equal(result_BV[1::2], expected_BV)
    assert Masks.of([None] * 3, torch.device("cpu")) is None


def test_what_all_grammars_share_is_made_before_the_first(monkeypatch):
    compiler = GrammarCompiler(byte_tokenizer(), vocab_size=VOCAB_SIZE, eos_ids=[1])
    compiler.prepare()
    monkeypatch.setattr("llguidance.hf.from_tokenizer", None)
    assert not compiler.compile(StructuredOutputsParams(json_object=True)).is_error()
    GrammarCompiler(byte_tokenizer(), vocab_size=VOCAB_SIZE, eos_ids=[]).prepare()  # no grammar could end
