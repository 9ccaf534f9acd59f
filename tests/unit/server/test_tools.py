"""Which style a chat template's calls have, what a model is told of tools, and the grammars of calls."""

import json
from pathlib import Path

import pytest
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from quantkit.runtime.grammar import FREE_TOKENS, LIMITS
from quantkit.runtime.tokenizer import Tokenizer
from quantkit.server.tool_calls import HERMES, LLAMA3, STYLES
from quantkit.server.tool_schema import Function
from quantkit.server.tools import CallGrammar, ToolSupport, described, find_support
from tests.byte_tokenizer import TEMPLATE, byte_tokenizer

LISTED = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
MESSAGES = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls %}CALL{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
HERMES_CALL = (
    '<tool_call>\n{"arguments": {{ call.function.arguments | tojson }}, '
    '"name": "{{ call.function.name }}"}\n</tool_call>'
)
LLAMA_CALL = '{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}'
XML_CALL = "<tool_call>\n<function={{ call.function.name }}></function>\n</tool_call>"
FUNCTIONS = [
    Function(
        name="f",
        strict=True,
        parameters={"$ref": "#/$defs/p", "$defs": {"p": {"type": "object", "maxProperties": 0}}},
    ),
    Function(name="g-h"),
]


def tokenizer(template):
    backend = byte_tokenizer()
    backend.chat_template = template
    return Tokenizer(Path("tiny"), backend)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LISTED + MESSAGES.replace("CALL", HERMES_CALL), "hermes"),
        (LISTED + MESSAGES.replace("CALL", LLAMA_CALL), "llama3_json"),
        (LISTED + MESSAGES.replace("CALL", XML_CALL), "None"),
        (MESSAGES.replace("CALL", HERMES_CALL), "None"),  # calls, but no tools
        (LISTED + "{{ raise_exception('no calls') if messages | length > 1 }}", "None"),
        (TEMPLATE, "None"),
        (None, "None"),
    ],
)
def test_the_style_is_the_one_that_reads_what_the_template_writes(template, expected):
    assert str(find_support(tokenizer(template), "auto")) == expected


def test_an_operators_choice_is_taken():
    assert find_support(tokenizer(LISTED + MESSAGES.replace("CALL", HERMES_CALL)), "none") is None
    assert str(find_support(tokenizer(TEMPLATE), "hermes")) == "hermes, described by the server"


def test_an_opening_that_is_a_token_is_shown_and_forced_as_one():
    chosen = tokenizer(TEMPLATE)
    chosen.backend.add_special_tokens({"additional_special_tokens": ["<|python_tag|>"]})
    support = find_support(chosen, "llama3_json")
    assert support.skips and list(support.marks) == ["<|python_tag|>"]
    assert not find_support(tokenizer(TEMPLATE), "llama3_json").skips


@pytest.mark.parametrize("style", STYLES)
def test_tools_and_calls_as_text(style):
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": "é"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    told = described(messages, [{"type": "function", "function": {"name": "f"}}], style)
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be brief.\n\n") and '"name": "f"' in told[0]["content"]
    assert told[2]["content"] == style.written("f", '{"x": "é"}')
    assert "42" in told[3]["content"]
    assert [message["role"] for message in described(messages[1:2], [{}], style)] == ["system", "user"]


def accepts(grammar, pieces, backend):
    """Whether it takes these tokens, or texts, as a whole."""
    matcher = LLMatcher(
        from_tokenizer(backend, eos_token=[1]), FREE_TOKENS + grammar, limits=LIMITS, log_level=0
    )
    assert not matcher.is_error(), matcher.get_error()
    ids = [
        token
        for piece in pieces
        for token in ([piece] if isinstance(piece, int) else backend(piece).input_ids)
    ]
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("style", STYLES)
def test_a_grammar_takes_calls_and_text_apart(style):
    backend = byte_tokenizer()
    rules = CallGrammar.of(ToolSupport(style, True, {}, False), FUNCTIONS, is_one=False)
    one, other = style.written("f", "{}"), style.written("g-h", "{ }")
    between = "; " if style is LLAMA3 else "\n"
    forced = f"start: calls\n{rules.rules}\n"
    assert accepts(forced, [one], backend) and accepts(forced, [one, between, other], backend)
    for wrong in ("", "text", style.written("f", '{"x": 1}'), style.written("no", "{}"), one + between):
        assert not accepts(forced, [wrong], backend)
    single = CallGrammar.of(ToolSupport(style, True, {}, False), FUNCTIONS, is_one=True)
    assert not accepts(f"start: calls\n{single.rules}\n", [one, between, other], backend)
    free = f"start: text? | {rules.begun}\n{rules.rules}\n"
    for fine in ("", "any text\n <tool", one):
        assert accepts(free, [fine], backend)
    for wrong in (style.written("f", "{1}"), style.opening):
        assert not accepts(free, [wrong], backend)


def test_marks_that_are_tokens_are_forced_as_tokens_after_any_text():
    backend = byte_tokenizer()
    backend.add_tokens(["<tool_call>", "</tool_call>"])
    chosen = Tokenizer(Path("tiny"), backend)
    chosen.backend.chat_template = TEMPLATE
    support = find_support(chosen, "hermes")
    opening, closing = (support.marks[mark] for mark in (HERMES.opening, HERMES.closing))
    rules = CallGrammar.of(support, FUNCTIONS, is_one=True)
    grammar = f"start: text? | {rules.begun}\n{rules.rules}\n"
    call = [opening, "\n" + json.dumps({"name": "g-h", "arguments": {}}) + "\n", closing]
    assert accepts(grammar, call, backend) and accepts(grammar, ["Let me see.\n", *call], backend)
    assert not accepts(grammar, [opening, "text"], backend)
