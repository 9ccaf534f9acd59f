"""Load on a server whose delays, tokens and errors are known; and the arithmetic of what comes back."""

import asyncio
import json

import pytest

from quantkit.bench.arrivals import Arrivals
from quantkit.bench.load import Outcome, Run
from quantkit.bench.load_report import report_of
from quantkit.bench.slo import Slo, parse_slo
from quantkit.bench.sse_client import Answer, parse_server
from quantkit.bench.sse_events import Events, Problem
from quantkit.cli.main import run
from quantkit.errors import BenchError
from tests.openai_stand_in import StandIn, chunk, error, serving, sse, usage

FIRST, NEXT = 0.04, 0.005  # seconds until the stand-in sends


async def steady(body):
    """As many tokens as asked for, each in an event of its own."""
    is_chat = "messages" in body

    async def events():
        await asyncio.sleep(FIRST)
        for number in range(body["max_tokens"]):
            if number:
                await asyncio.sleep(NEXT)
            yield chunk("a", is_chat=is_chat)
        yield chunk(None, is_chat=is_chat, finish="length")
        yield usage(10, body["max_tokens"])
        yield "[DONE]"

    return sse(events())


def bench(stand_in, capsys, *options, code=0):
    """The report of one run."""
    with serving(stand_in.app) as url:
        assert run(["bench", "serve", "--url", url, "--json", *options]) == code
    return json.loads(capsys.readouterr().out) if code == 0 else capsys.readouterr().err


def test_times_are_never_shorter_than_the_servers_and_counts_are_exact(capsys):
    stand_in = StandIn(steady)
    report = bench(
        stand_in,
        capsys,
        "--concurrency",
        "4",
        "--requests",
        "12",
        "--output-tokens",
        "5",
        "--prompt-tokens",
        "7",
    )
    assert (report["num_requests"], report["num_answered"], report["errors"]) == (12, 12, {})
    assert (report["num_prompt_tokens"], report["num_output_tokens"]) == (120, 60)
    assert report["ttft_ms"]["50"] >= FIRST * 1e3
    assert report["tpot_ms"]["50"] >= NEXT * 1e3
    assert report["e2e_ms"]["50"] >= (FIRST + 4 * NEXT) * 1e3
    assert report["seconds"] >= 3 * (FIRST + 4 * NEXT)  # twelve, four at a time
    assert report["output_rate"] == pytest.approx(60 / report["seconds"])
    assert stand_in.most == 4
    assert len(stand_in.bodies) == 13  # one ahead of all
    assert all(len(body["prompt"]) == 7 for body in stand_in.bodies)
    assert len({tuple(body["prompt"]) for body in stand_in.bodies}) == 13


def test_a_rate_does_not_wait_for_answers(capsys):
    stand_in = StandIn(steady)
    report = bench(stand_in, capsys, "--rate", "1000", "--requests", "20", "--output-tokens", "2")
    assert report["num_answered"] == 20
    assert stand_in.most > 4


def test_a_chat_has_messages_and_a_role_alone_is_no_token(capsys):
    async def answer(body):
        async def events():
            yield {
                "choices": [
                    {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                ]
            }
            await asyncio.sleep(FIRST)
            yield chunk("a", is_chat=True)
            yield "[DONE]"

        return sse(events())

    stand_in = StandIn(answer)
    report = bench(
        stand_in,
        capsys,
        "--concurrency",
        "1",
        "--requests",
        "2",
        "--endpoint",
        "chat",
        "--prompt-tokens",
        "9",
    )
    assert report["ttft_ms"]["50"] >= FIRST * 1e3
    assert (report["has_usage"], report["num_output_tokens"]) == (False, 2)
    assert len(stand_in.bodies[0]["messages"][0]["content"].split()) == 9


def test_errors_are_counted_by_kind_and_not_timed(capsys):
    answers = iter(
        ["whole"] * 2 + ["429"] * 3 + ["in stream"] * 2 + ["cut off", "no DONE", "slow", "not JSON", "whole"]
    )

    async def answer(body):
        kind = next(answers)
        if kind == "429":
            return error(429, "too much waits", **{"Retry-After": "1"})

        async def events():
            yield chunk("a", is_chat=False)
            if kind == "in stream":
                yield {"error": {"message": "the engine died"}}
            elif kind == "slow":
                await asyncio.sleep(5)
            elif kind == "not JSON":
                yield "{"
            elif kind == "cut off":
                raise ConnectionError("scripted")
            elif kind == "whole":
                yield "[DONE]"

        return sse(events())

    report = bench(StandIn(answer), capsys, "--concurrency", "1", "--requests", "11", "--timeout", "2")
    assert report["errors"] == {
        "HTTP 429": 3,
        "error in the stream": 2,
        "cut off": 2,
        "timeout": 1,
        "no OpenAI event": 1,
    }
    assert report["messages"]["HTTP 429"] == "too much waits"
    assert report["messages"]["error in the stream"] == "the engine died"
    assert (report["num_requests"], report["num_answered"], report["num_output_tokens"]) == (11, 2, 2)


def test_goodput_counts_answers_that_keep_the_objective(capsys):
    options = ("--concurrency", "2", "--requests", "4", "--output-tokens", "2", "--slo")
    never = bench(StandIn(steady), capsys, *options, f"ttft={FIRST * 500:g}ms")
    always = bench(StandIn(steady), capsys, *options, "ttft=60s,tpot=60s,e2e=60s")
    assert never["goodput"] == 0
    assert always["goodput"] == always["request_rate"]


def test_the_table_and_the_key(capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(StandIn(steady).app) as url:
        assert (
            run(
                [
                    "bench",
                    "serve",
                    "--url",
                    f"{url}/v1",
                    "--rate",
                    "50",
                    "--requests",
                    "3",
                    "--output-tokens",
                    "4",
                ]
            )
            == 0
        )
    shown = capsys.readouterr()
    assert "3 of 3 requests answered, 30 tokens of prompts, 12 of answers" in shown.out
    for word in ("TTFT", "TPOT", "ITL", "E2E", "p50", "p99", "requests/s"):
        assert word in shown.out
    assert "secret" not in shown.out + shown.err
    assert parse_server(url, "secret").headers == (("Authorization", "Bearer secret"),)


def test_prompts_come_from_a_file_in_turn(capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    stand_in = StandIn(steady)
    bench(
        stand_in,
        capsys,
        *(
            "--concurrency",
            "1",
            "--requests",
            "2",
            "--prompts",
            str(tmp_path / "prompts.txt"),
            "--stop-at-eos",
        ),
    )
    assert [body["prompt"] for body in stand_in.bodies] == ["one", "two", "one"]
    assert not any("ignore_eos" in body for body in stand_in.bodies)


def test_a_server_that_refuses_is_a_mistake_before_the_load(capsys):
    async def refuse(body):
        return error(400, "Unknown parameter: 'ignore_eos'.")

    stand_in = StandIn(refuse)
    message = bench(stand_in, capsys, "--concurrency", "8", code=2)
    assert "HTTP 400: Unknown parameter: 'ignore_eos'." in message
    assert len(stand_in.bodies) == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "either a rate or a concurrency"),
        (["--rate", "1", "--concurrency", "1"], "either a rate or a concurrency"),
        (["--rate", "0"], "--rate 0.0 makes no sense"),
        (["--rate", "nan"], "--rate nan makes no sense"),
        (["--rate", "1", "--url", "127.0.0.1:8000"], "not the URL of a server"),
        (["--rate", "1", "--timeout", "nan"], "--timeout nan makes no sense"),
        (["--rate", "1", "--url", "http://127.0.0.1:9"], "no connection"),
        (["--rate", "1", "--url", "http://127.0.0.1:9/a b"], "not the URL of a server"),
        (["--rate", "1", "--url", "http://a..b"], "no connection"),
        (["--rate", "1", "--slo", "ttft=200"], "no objective"),
        (["--rate", "1", "--prompts", "/nowhere", "--model", "m"], "cannot be read"),
    ],
)
def test_mistakes(options, problem, capsys):
    assert run(["bench", "serve", *options]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "ttft", "ttft=1m", "ttft=-1s", "itl=1s", "ttft=1s,ttft=2s", "ttft=1s,"])
def test_objectives_that_make_no_sense(text):
    with pytest.raises(BenchError, match="no objective"):
        parse_slo(text)


def test_an_objective_bounds_what_it_names():
    slo = parse_slo("ttft=200ms, tpot=30ms")
    assert slo == Slo(ttft=0.2, tpot=0.03, e2e=None)
    assert slo.is_met(Arrivals(1, 3, (0.2, 0.26)), 100)
    assert not slo.is_met(Arrivals(1, 3, (0.21, 0.26)), 1)
    assert not slo.is_met(Arrivals(1, 2, (0.2, 0.26)), 1)
    assert slo.is_met(Arrivals(1, 1, (0.1,)), 1)  # no second token, no time per token


def test_a_report_by_hand():
    outcomes = [
        Outcome(0.0, Answer(4.0, Arrivals(10, 4, (1.0, 3.0, 4.0)), True, None)),
        Outcome(1.0, Answer(7.0, None, False, Problem("timeout", "no end"))),
    ]
    report = report_of(Run(outcomes, busy=0.1), Slo(ttft=1.0))
    assert report.seconds == 8
    assert report.tpot_ms == pytest.approx({50: 1000, 90: 1000, 99: 1000})
    assert report.itl_ms[50] == pytest.approx(1500)
    assert report.output_rate == pytest.approx(0.5)
    assert report.goodput == report.request_rate == pytest.approx(1 / 8)
    nothing = report_of(Run(outcomes[1:], busy=0.1), None)
    assert (nothing.ttft_ms, nothing.e2e_ms, nothing.goodput, nothing.output_rate) == (None, None, None, 0)


def test_events_do_not_depend_on_how_bytes_are_cut():
    parts = [chunk("é", is_chat=False), chunk("b", is_chat=False, finish="stop"), usage(3, 2)]
    lines = [f"data: {json.dumps(part, ensure_ascii=False)}\r\n\r\n" for part in parts]
    stream = "".join([": a comment\n\n", *lines, "data: [DONE]\n\n"]).encode()
    for size in (1, 2, 7, len(stream)):
        events = Events()
        for start in range(0, len(stream), size):
            events.add(stream[start : start + size], float(start))
        assert events.problem() is None
        found = events.arrivals()
        assert (found.num_prompt_tokens, found.num_output_tokens, len(found.seconds)) == (3, 2, 2)


def test_an_answer_without_text_has_its_end_as_first_token():
    events = Events()
    events.add(
        f"data: {json.dumps(chunk('', is_chat=False, finish='length'))}\n\ndata: [DONE]\n\n".encode(), 2.0
    )
    assert events.arrivals().ttft == 2.0


def test_a_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "load.svg"
    bench(
        StandIn(steady),
        capsys,
        "--rate",
        "100",
        "--requests",
        "5",
        "--slo",
        "ttft=1s",
        "--plot",
        str(picture),
    )
    assert picture.read_text().count("<path") > 20


def test_a_plot_that_cannot_be_made_is_said_before_anything_is_sent(capsys, tmp_path):
    assert run(["bench", "serve", "--rate", "1", "--plot", str(tmp_path / "none" / "load.png")]) == 2
    assert "--plot" in capsys.readouterr().err
