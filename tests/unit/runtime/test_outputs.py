"""What requests get: pieces that join to the text cut at the first stop string, finish reasons, log probabilities."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.runtime.logprobs import TokenLogprobs
from quantkit.runtime.outputs import Logprob, NewToken, OutputProcessor
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.sequence import FinishReason
from quantkit.runtime.tokenizer import Tokenizer

EOS = 1
ALPHABET = st.sampled_from("abà€")
shared_fixture = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def tokenizer(byte_tokenizer, tmp_path):
    return Tokenizer(tmp_path, byte_tokenizer)


def ids_of(tokenizer, text):
    return tokenizer.backend(text, add_special_tokens=False)["input_ids"]


class Talk:
    """One request, whose tokens come one by one until it ends."""

    def __init__(self, tokenizer, *, num_answers=1, is_streamed=True, **params):
        self.processor = OutputProcessor(tokenizer)
        self.params = SamplingParams(**({"max_tokens": 1000, "n": num_answers} | params))
        self.outputs = []
        self.stopped = []
        ids = list(range(7, 7 + num_answers))
        self.processor.add("r", "prompt", [4, 5], self.params, ids, now=1.0, is_streamed=is_streamed)

    def say(self, *token_ids, finish=None, sequence_id=7, logprobs=None):
        """Tokens, the last with `finish`, until a stop string ends it."""
        for number, token_id in enumerate(token_ids, start=1):
            reason = finish if number == len(token_ids) else None
            token = NewToken(sequence_id, token_id, reason, logprobs, num_cached_tokens=1)
            processed = self.processor.process([token], now=float(number + 1))
            self.outputs += processed.outputs
            self.stopped += processed.stopped
            if processed.stopped:
                break

    @property
    def pieces(self):
        return [output.outputs[0].text for output in self.outputs]

    @property
    def last(self):
        return self.outputs[-1].outputs[0]


def cut(text, stops, is_included):
    """Text up to the stop string that ends first, of those the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end if is_included else end - len(longest)], longest
    return text, None


@shared_fixture
@given(
    text=st.text(ALPHABET, min_size=1, max_size=20),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3),
    is_included=st.booleans(),
    finish=st.sampled_from(["length", "context", "stop"]),
)
def test_pieces_join_to_the_text_cut_at_the_first_stop(text, stops, is_included, finish, tokenizer):
    ids = ids_of(tokenizer, text)
    ids += [EOS] if finish == "stop" else []
    talk = Talk(tokenizer, stop=stops, include_stop_str_in_output=is_included)
    talk.say(*ids, finish=FinishReason(finish))
    whole = Talk(tokenizer, stop=stops, include_stop_str_in_output=is_included, is_streamed=False)
    whole.say(*ids, finish=FinishReason(finish))
    expected, found = cut(text, stops, is_included)
    assert "".join(talk.pieces) == whole.last.text == expected
    assert not any("�" in piece for piece in talk.pieces)
    assert talk.last.stop_reason == whole.last.stop_reason == found
    assert talk.last.finish_reason == (FinishReason(finish) if found is None else FinishReason.STOP)
    num_tokens = len(talk.outputs)
    assert [output.finished for output in talk.outputs] == [False] * (num_tokens - 1) + [True]
    assert [token for output in talk.outputs for token in output.outputs[0].token_ids] == ids[:num_tokens]
    assert whole.last.token_ids == ids[:num_tokens]
    assert len(whole.outputs) == 1
    ended_by_engine = num_tokens == len(ids)
    assert talk.stopped == whole.stopped == ([] if ended_by_engine else [7]), "the engine has not ended it"


@shared_fixture
@given(
    text=st.text(ALPHABET, max_size=16),
    stop=st.text(ALPHABET, min_size=1, max_size=3),
    min_tokens=st.integers(0, 12),
)
def test_text_of_the_first_tokens_stops_nothing(text, stop, min_tokens, tokenizer):
    """Characters that are complete within `min_tokens` tokens are not looked at."""
    ids = ids_of(tokenizer, text)
    talk = Talk(tokenizer, stop=stop, min_tokens=min_tokens)
    talk.say(*ids, EOS, finish=FinishReason.STOP)
    if talk.stopped:
        assert len(talk.outputs) > min_tokens
    num_bytes, skipped = 0, ""
    for character in text:
        num_bytes += len(character.encode())
        skipped += character if num_bytes <= min_tokens else ""
    assert "".join(talk.pieces) == skipped + cut(text[len(skipped) :], [stop], False)[0]


def test_text_is_given_out_as_soon_as_it_is_certain(tokenizer):
    talk = Talk(tokenizer, stop=["<|end|>"])
    talk.say(*ids_of(tokenizer, "a<|en|€<|end|>"))
    assert talk.pieces[:6] == ["a", "", "", "", "", "<|en|"]
    assert "".join(talk.pieces) == "a<|en|€"
    assert talk.last.stop_reason == "<|end|>"
    assert talk.last.finish_reason is FinishReason.STOP


def test_what_was_held_back_comes_at_the_end(tokenizer):
    talk = Talk(tokenizer, stop=["abc"])
    talk.say(*ids_of(tokenizer, "xab"), finish=FinishReason.LENGTH)
    assert talk.pieces == ["x", "", "ab"]
    unfinished = Talk(tokenizer)
    unfinished.say(*ids_of(tokenizer, "€")[:2], finish=FinishReason.LENGTH)
    assert unfinished.pieces == ["", "�"]


def test_a_stop_token_has_text_only_if_it_is_asked_for(tokenizer):
    stop = ids_of(tokenizer, "z")[0]
    for params, token, text, reason in (
        ({}, EOS, "a", None),
        ({"stop_token_ids": [stop]}, stop, "a", stop),
        ({"stop_token_ids": [stop], "include_stop_str_in_output": True}, stop, "az", stop),
        ({"include_stop_str_in_output": True}, EOS, "a", None),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, EOS, "a<eos>", None),
    ):
        talk = Talk(tokenizer, **params)
        talk.say(*ids_of(tokenizer, "a"), token, finish=FinishReason.STOP)
        assert "".join(talk.pieces) == text
        assert talk.last.stop_reason == reason
        assert talk.last.token_ids == [token]


def test_answers_of_a_request_end_by_themselves(tokenizer):
    a, b = ids_of(tokenizer, "ab")
    talk = Talk(tokenizer, num_answers=2, is_streamed=False)
    talk.say(a, EOS, finish=FinishReason.STOP)
    assert talk.outputs == []
    talk.say(b, b, b, finish=FinishReason.LENGTH, sequence_id=8)
    (output,) = talk.outputs
    assert output.finished
    assert [(each.index, each.text, each.finish_reason) for each in output.outputs] == [
        (0, "a", FinishReason.STOP),
        (1, "bbb", FinishReason.LENGTH),
    ]


def test_a_delta_has_the_answers_with_something_new(tokenizer):
    a, b = ids_of(tokenizer, "ab")
    talk = Talk(tokenizer, num_answers=2)
    tokens = [NewToken(7, a, None), NewToken(8, b, None)]
    (output,) = talk.processor.process(tokens, now=2.0).outputs
    assert [(each.index, each.text) for each in output.outputs] == [(0, "a"), (1, "b")]
    talk.say(a, sequence_id=8)
    assert [(each.index, each.text) for each in talk.outputs[0].outputs] == [(1, "a")]


def test_what_else_is_known_of_a_request(tokenizer):
    talk = Talk(tokenizer)
    talk.say(*ids_of(tokenizer, "abc"), finish=FinishReason.LENGTH)
    first, _, last = talk.outputs
    assert (first.request_id, first.prompt, first.prompt_token_ids) == ("r", "prompt", [4, 5])
    assert first.num_cached_tokens == 1
    assert first.metrics == (1.0, 2.0, None)
    assert last.metrics == (1.0, 2.0, 4.0)
    assert first.outputs[0].logprobs is first.outputs[0].cumulative_logprob is None


def test_log_probabilities_by_token_the_chosen_one_always(tokenizer):
    a, b = ids_of(tokenizer, "ab")
    talk = Talk(tokenizer, logprobs=1)
    talk.say(a, logprobs=TokenLogprobs(-0.5, 1, [a], [-0.5]))
    talk.say(b, logprobs=TokenLogprobs(-2.0, 3, [EOS], [-0.25]))
    first, second = (output.outputs[0] for output in talk.outputs)
    assert first.logprobs == [{a: Logprob(-0.5, 1, "a")}]
    assert second.logprobs == [{EOS: Logprob(-0.25, 1, "<eos>"), b: Logprob(-2.0, 3, "b")}]
    assert (first.cumulative_logprob, second.cumulative_logprob) == (-0.5, -2.5)


def test_an_aborted_request_is_forgotten(tokenizer):
    a, _ = ids_of(tokenizer, "ab")
    talk = Talk(tokenizer, num_answers=2)
    talk.say(EOS, finish=FinishReason.STOP)
    assert talk.processor.abort("r") == [8]
    assert talk.processor.abort("r") == []
    with pytest.raises(KeyError):
        talk.say(a, sequence_id=8)
    talk.processor.add("r", None, [4], talk.params, [9], now=5.0, is_streamed=True)
