"""Messages between the processes: what is sent arrives, in pieces of any size."""

import dataclasses

import msgpack
from hypothesis import given
from hypothesis import strategies as st

from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.settings import EngineSettings
from quantkit.runtime.structured_outputs import StructuredOutputsParams
from quantkit.server.messages import (
    Abort,
    CannotStart,
    Choice,
    ChosenToken,
    Decoder,
    Delta,
    Failed,
    Progress,
    Ready,
    Refused,
    Start,
    Stats,
    Stepped,
    Submit,
    encode,
)

GUIDED = SamplingParams(structured_outputs=StructuredOutputsParams(choice=("a", "b")))
PARAMS = SamplingParams(stop=("a", "b"), logit_bias={3: -1.5, 70000: 2}, seed=2**63 - 1, logprobs=2)
TOKEN = ChosenToken("é", -0.5, [("é", -0.5), (b"\xc3", -1.25)])
MESSAGES = [
    Start("/some/folder", dataclasses.asdict(EngineSettings())),
    Submit("7-0", list(range(1000)), dataclasses.asdict(PARAMS)),
    Submit("8-0", [1], dataclasses.asdict(GUIDED)),
    Abort("7-0"),
    Progress("weights 3 GB"),
    Ready(9, 260, 4096, 8, 1 << 20, 16, "cuda:0", {"load": 0.5}),
    CannotStart("no", "yes"),
    Refused("7-0", "too long", "shorten it"),
    Failed("7-0", "out of memory"),
    Stepped([], 0.5, [], Stats(0, 0, 0.0, 0, 0, 0)),
    Stepped(
        ["7-0"],
        1.25,
        [
            Delta(
                "7-0",
                [Choice(0, "é\n", 1, None, None, [TOKEN]), Choice(1, "", 1, "stop", 5, None)],
                False,
                32,
                1.5,
            ),
            Delta("8-0", [Choice(0, "x", 1, "stop", "x", None)], True, 0, None),
        ],
        Stats(3, 2, 0.25, 100, 50, 1),
    ),
]


def as_sent(message):
    """msgpack has no tuples."""
    return msgpack.unpackb(msgpack.packb(message), strict_map_key=False)


@given(st.lists(st.integers(1, 400), min_size=1))
def test_messages_arrive_however_they_are_cut(sizes):
    data, decoder, found = b"".join(map(encode, MESSAGES)), Decoder(), []
    while data:
        size = sizes[len(data) % len(sizes)]
        found += decoder.feed(data[:size])
        data = data[size:]
    assert [type(message) for message in found] == [type(message) for message in MESSAGES]
    assert [as_sent(message) for message in found] == [as_sent(message) for message in MESSAGES]
    for message in found:
        for delta in message.deltas if isinstance(message, Stepped) else ():
            assert all(
                isinstance(token, ChosenToken) for choice in delta.choices for token in choice.tokens or ()
            )


def test_params_and_settings_are_the_same_on_the_other_side():
    start, submit = Decoder().feed(encode(MESSAGES[0]) + encode(MESSAGES[1]))
    assert EngineSettings(**start.settings) == EngineSettings()
    assert SamplingParams(**submit.params) == PARAMS
