"""Stop strings: the text is cut at the first, and nothing waits longer than it has to."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.runtime.stop_strings import StopStrings

ALPHABET = st.sampled_from("abà€")


def cut(text, stops, are_included):
    """Text up to the stop string that ends first, of those the longest: by the definition."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end if are_included else end - len(longest)], longest
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.text(ALPHABET, max_size=4), max_size=12),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4),
    are_included=st.booleans(),
)
def test_any_pieces_join_to_the_text_cut_at_the_first_stop(pieces, stops, are_included):
    matcher, given_out, seen, found = StopStrings(stops, are_included=are_included), "", "", None
    for piece in pieces:
        text, found = matcher.add(piece)
        given_out, seen = given_out + text, seen + piece
        if found is not None:
            break
        beginnings = [
            stop[:length] for stop in stops for length in range(1, len(stop)) if seen.endswith(stop[:length])
        ]
        held = max(map(len, beginnings), default=0)
        assert given_out == seen[: len(seen) - held], "given out as soon as it begins no stop string"
    else:
        given_out += matcher.flush()
    assert (given_out, found) == cut("".join(pieces), stops, are_included)


def test_a_stop_string_across_pieces_and_within_one():
    matcher = StopStrings(["<end>"], are_included=False)
    assert matcher.add("text <") == ("text ", None)
    assert matcher.add("en") == ("", None)
    assert matcher.add("t>") == ("<ent>", None)
    assert matcher.add("more<end>rest") == ("more", "<end>")


def test_a_beginning_within_a_beginning():
    matcher = StopStrings(["aab"], are_included=False)
    assert matcher.add("aaa") == ("a", None)
    assert matcher.add("ab") == ("a", "aab")


@pytest.mark.parametrize(("stops", "found"), [(["abc", "b"], "b"), (["b", "ab"], "ab"), (["c", "bc"], "bc")])
def test_the_first_to_end_then_the_longest(stops, found):
    text, stop = StopStrings(stops, are_included=True).add("xabcx")
    assert stop == found
    assert text == "xabcx"[: "xabcx".index(found) + len(found)]


def test_time_does_not_grow_with_what_is_held():
    stop = "a" * 256
    matcher = StopStrings([stop], are_included=False)
    given_out = "".join(matcher.add("a" * 255 + "b")[0] for _ in range(400))
    assert len(given_out) == 400 * 256
