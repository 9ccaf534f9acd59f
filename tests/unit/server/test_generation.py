"""The buffer between engine and client: merged, bounded, ended once."""

import asyncio

import pytest

from quantkit.server import generation as module
from quantkit.server.errors import ApiError, failed
from quantkit.server.generation import Generation
from quantkit.server.messages import Choice, ChosenToken, Delta

TOKEN = ChosenToken("x", -1.0, [("x", -1.0)])


def delta(part, *choices, is_finished=False, num_cached=0):
    return Delta(part, list(choices), is_finished, num_cached, None)


def piece(number, text, finish=None, tokens=None):
    return Choice(number, text, 1, finish, None, tokens)


def taken(generation):
    """All pieces, as an eager reader gets them after everything was put."""

    async def take():
        return [choices async for choices in generation.pieces()]

    return asyncio.run(take())


def test_what_nobody_took_is_one_piece_for_each_choice():
    generation = Generation(3, [5], arrival=0.0, num_answers=2, is_streamed=True)
    generation.put(delta("3-0", piece(1, "b", tokens=[TOKEN]), piece(0, "a", tokens=[TOKEN])), now=1.0)
    generation.put(delta("3-0", piece(1, "B", "stop", tokens=[TOKEN])), now=1.0)
    generation.put(
        delta("3-0", piece(0, "A", "length", tokens=[TOKEN]), is_finished=True, num_cached=4), now=1.0
    )
    assert taken(generation) == [
        [Choice(0, "aA", 2, "length", None, [TOKEN] * 2), Choice(1, "bB", 2, "stop", None, [TOKEN] * 2)]
    ]
    assert (generation.num_tokens, generation.num_cached_tokens) == (4, 4)
    assert generation.finish_reasons == ["stop", "length"]


def test_a_grammar_that_is_lost_is_the_clients_mistake():
    generation = Generation(0, [1], arrival=0.0, num_answers=1, is_streamed=True)
    generation.put(delta("0-0", piece(0, "a", "grammar"), is_finished=True), now=1.0)
    with pytest.raises(ApiError, match="grammar") as caught:
        taken(generation)
    assert caught.value.status == 400


def test_prompts_have_their_choices_in_their_order():
    generation = Generation(0, [1, 1], arrival=0.0, num_answers=2, is_streamed=False)
    generation.put(delta("0-1", piece(0, "c", "stop"), piece(1, "d", "stop"), is_finished=True), now=1.0)
    generation.put(delta("0-0", piece(0, "a", "stop"), piece(1, "b", "stop"), is_finished=True), now=1.0)
    ((*choices,),) = taken(generation)
    assert [(choice.number, choice.text) for choice in choices] == list(enumerate("abcd"))


def test_a_reader_gets_pieces_as_they_come():
    async def read():
        generation = Generation(0, [1], arrival=0.0, num_answers=1, is_streamed=True)
        pieces = generation.pieces()
        texts = []
        for text, is_last in (("a", False), ("b", False), ("c", True)):
            generation.put(
                delta("0-0", piece(0, text, "stop" if is_last else None), is_finished=is_last), now=1.0
            )
            texts += [choice.text for choice in await anext(pieces)]
        with pytest.raises(StopAsyncIteration):
            await anext(pieces)
        return texts

    assert asyncio.run(read()) == ["a", "b", "c"]


def test_it_ends_once():
    generation = Generation(0, [1], arrival=0.0, num_answers=1, is_streamed=True)
    generation.fail(failed("first"))
    generation.fail(failed("second"))
    with pytest.raises(ApiError, match="first"):
        taken(generation)
    finished = Generation(0, [1], arrival=0.0, num_answers=1, is_streamed=True)
    finished.put(delta("0-0", piece(0, "a", "stop"), is_finished=True), now=1.0)
    finished.fail(failed("too late"))
    assert finished.error is None
    assert len(taken(finished)) == 1


@pytest.mark.parametrize(("is_streamed", "status"), [(True, 408), (False, 400)])
def test_nothing_is_held_for_a_reader_too_far_behind(is_streamed, status, monkeypatch):
    monkeypatch.setattr(module, "MAX_BEHIND_TOKENS", 6)
    monkeypatch.setattr(module, "MAX_WHOLE_TOKENS", 6)
    generation = Generation(0, [1], arrival=0.0, num_answers=1, is_streamed=is_streamed)
    for _ in range(3):  # each of a token and one likeliest one
        generation.put(delta("0-0", piece(0, "a", tokens=[TOKEN])), now=1.0)
    assert generation.error is None
    generation.put(delta("0-0", piece(0, "a")), now=1.0)
    assert generation.error.status == status
    assert not generation._pending


@pytest.mark.parametrize("is_last", [False, True])
def test_logits_that_are_no_numbers_are_the_servers_fault(is_last):
    generation = Generation(0, [1], arrival=0.0, num_answers=1 if is_last else 2, is_streamed=True)
    generation.put(delta("0-0", Choice(0, "", 0, "error", None, None), is_finished=is_last), now=1.0)
    assert (generation.error.status, generation.error.code) == (500, "model_error")
