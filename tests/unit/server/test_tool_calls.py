"""Calls in the text of answers: found whatever pieces it comes in, and never lost."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.server.tool_calls import HERMES, LLAMA3, STYLES, Call, Content, ToolCallParser

NAMES = frozenset({"f", "weather"})
GOOD = {style.name: style.written("f", '{"x": "a}\\" </tool_call> é"}') for style in STYLES}
FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "<tool", "_call>", "<|", "{", "}", '"', "\\", "[",
    "]", ";", " ", "\n",
    '{"name": "f", "arguments": {}}', '{"name": "weather", "parameters": {"x": [1, {"y": null}]}}', '{"name": "g",',
    '"arguments": ', "text", "1e999", "é", *GOOD.values(),
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=25).map("".join)


def parse(style, pieces, **options):
    parser = ToolCallParser(style, NAMES, **options)
    events = [event for piece in pieces for event in parser.add(piece)]
    return merged(events + parser.flush())


def merged(events):
    """Content that follows content joined to it."""
    result = []
    for event in events:
        if isinstance(event, Content) and result and isinstance(result[-1], Content):
            result[-1] = Content(result[-1].text + event.text)
        else:
            result.append(event)
    return result


@settings(max_examples=400, deadline=None)
@given(text=TEXTS, data=st.data(), style=st.sampled_from(STYLES), most=st.sampled_from([None, 1]))
def test_any_split_of_any_text_gives_the_same(text, data, style, most):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(style, [text], max_calls=most)
    assert parse(style, pieces, max_calls=most) == whole
    assert parse(style, text, max_calls=most) == whole  # a character at a time
    for event in whole:
        assert isinstance(event, Content) or isinstance(json.loads(event.arguments), dict)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, style=st.sampled_from(STYLES))
def test_without_calls_every_text_is_content(text, style):
    parser = ToolCallParser(style, frozenset())
    events = parser.add(text) + parser.flush()
    assert "".join(event.text for event in events) == text


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.sampled_from(["call", "and so on", "é < {"]), max_size=6))
def test_hermes_calls_between_content(parts):
    text = "".join(GOOD["hermes"] if part == "call" else part for part in parts)
    expected = [
        Call("f", '{"x": "a}\\" </tool_call> é"}') if part == "call" else Content(part) for part in parts
    ]
    assert parse(HERMES, [text]) == merged(expected)


@pytest.mark.parametrize("style", STYLES)
def test_a_call_as_the_style_writes_it(style):
    text = style.written("weather", '{"city": "Köln", "days": [1, 2.5, null]}')
    assert parse(style, [f"\n{text} \n"])[-1] == Call("weather", '{"city": "Köln", "days": [1, 2.5, null]}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "f", "parameters": {}}', [Call("f", "{}")]),
        (
            '{"name": "f", "arguments": {}}; {"name": "f", "parameters": {"x": 1}}',
            [Call("f", "{}"), Call("f", '{"x": 1}')],
        ),
        ('so: <|python_tag|>{"name": "f", "parameters": {}}', [Content("so: "), Call("f", "{}")]),
        ('{"name": "f", "parameters": {}}; done', [Call("f", "{}"), Content("; done")]),
        ('say {"name": "f", "parameters": {}}', None),
        ('{"name": "Bob", "parameters": {}}', None),
        ('{"answer": 1}', None),
    ],
)
def test_bare_calls_begin_a_text(text, expected):
    assert parse(LLAMA3, [text]) == (expected or [Content(text)])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call> hm",
        '<tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
        '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>',
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1,}}</tool_call>',
        f'<tool_call>{{"name": "f", "arguments": {"[" * 5000}',
        f'<tool_call>{{"name": "f", "arguments": {{"x": {"9" * 5000}}}}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": "cut o',
    ],
)
def test_what_is_malformed_is_content(text):
    assert parse(HERMES, [text]) == [Content(text)]
    good = HERMES.written("f", "{}")
    if not text.endswith("cut o"):
        assert parse(HERMES, [text + good]) == [Content(text), Call("f", "{}")]  # the next one is found


def test_content_comes_as_soon_as_it_is_certain():
    parser = ToolCallParser(HERMES, NAMES)
    assert parser.add("Hello <") == [Content("Hello ")]
    assert parser.add("tool_c") == []
    assert parser.add("url> x") == [Content("<tool_curl> x")]


def test_so_many_calls_and_no_more():
    text = GOOD["hermes"] * 2
    assert parse(HERMES, [text], max_calls=1)[1:] == [Content(GOOD["hermes"])]


def test_many_openings_take_no_longer_than_their_text():
    text = '<tool_call>{"' * 20_000
    assert parse(HERMES, [text]) == [Content(text)]
