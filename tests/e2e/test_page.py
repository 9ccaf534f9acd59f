"""The chat page in a real browser, against a server whose answers are scripted: what is typed, sent, shown, stopped.

Skipped where there is no Chromium; screenshots go to the folder QUANTKIT_SCREENSHOTS names, if it does.
"""

import asyncio
import os
import threading
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse

from quantkit.server.page import page_response
from tests import serving as real
from tests.browser import DESK, PHONE, chromium, emulate
from tests.openai_stand_in import StandIn, chunk, error, serving, sse, usage
from tests.tiny_chat import save_tiny_chat

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

KEY = "secret"
REASON = "an attention projection: this recipe keeps them in 16 bits"
FACTS = {
    "model": "SmolLM2-135M-Instruct",
    "max_model_len": 8192,
    "num_kv_tokens": 61440,
    "device": "cpu",
    "sampling": {"temperature": 0.7, "top_p": 0.9},
    "checkpoint": {
        "source": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "description": "INT8 weights and inputs in the MLP, attention in 16 bits",
        "quantkit": "0.1.0",
        "bits_per_weight": 10.02,
        "kv_cache": None,
        "schemes": [
            {"scheme": "16 bits", "num_linears": 120, "reason": REASON, "least_sqnr_db": None},
            {
                "scheme": "INT8 channel, inputs INT8 token",
                "num_linears": 90,
                "reason": None,
                "least_sqnr_db": 39.8,
            },
        ],
        "evaluation": {
            "rows": [
                ["perplexity", "17.925", "18.236 (+1.74 %)"],
                ["KL divergence, mean", "0", "0.0178 (95 %: 0.0164 to 0.0190)"],
            ],
            "remarks": ["Measured against demo on 4 windows of 256 tokens of docs, in float32."],
        },
    },
}
TEXT = "Water is made of hydrogen and oxygen.\n\n```python\nprint('<b>H2O</b>')\n```\nTwo atoms and one."


class Page:
    """The page of one browser, and the server behind it."""

    def __init__(self, window, stand_in, url):
        self.window, self.stand_in = window, stand_in
        window.get(url)

    def find(self, selector):
        return self.window.find_element("css selector", selector)

    def texts(self, selector):
        """Read at one moment: what streams is drawn again and again."""
        script = "return [...document.querySelectorAll(arguments[0])].map((node) => node.innerText)"
        return self.window.execute_script(script, selector)

    def wait(self, condition, what):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.window, 30, poll_frequency=0.05).until(lambda _: condition(), what)

    def ready(self):
        self.wait(lambda: self.find("#send").is_enabled(), "the page knows its server")
        return self

    def press(self, *keys):
        from selenium.webdriver import ActionChains

        ActionChains(self.window).send_keys(*keys).perform()

    def ask(self, text):
        """Types it, sends it, and waits until an answer begins."""
        count = len(self.texts(".turn.assistant")) + 1
        self.find("#prompt").send_keys(text, "\n")
        self.wait(lambda: len(self.texts(".turn.assistant")) == count, "it is sent")
        self.wait(lambda: self.texts(".turn.assistant:last-child .text"), "an answer begins")

    def ended(self):
        self.wait(lambda: self.find("#send").is_displayed(), "the answer has ended")

    def shoot(self, name):
        if folder := os.environ.get("QUANTKIT_SCREENSHOTS"):
            self.window.save_screenshot(str(Path(folder) / f"{name}.png"))

    def script(self, text):
        return self.window.execute_script(f"return {text}")


class Chat(StandIn):
    """Answers TEXT, or what a message asks for; `goes_on` lets a slow answer end."""

    def __init__(self):
        super().__init__(self._script)
        self.goes_on = threading.Event()
        self.wants_key = False
        self.keys = []
        self.app.get("/")(self._page)
        self.app.get("/facts")(self._facts)

    async def _page(self):
        return page_response()

    async def _facts(self, request: Request):
        self.keys.append(request.headers.get("authorization"))
        if self.wants_key and self.keys[-1] != f"Bearer {KEY}":
            return error(401, "Incorrect API key provided.")
        return JSONResponse(FACTS)

    async def _script(self, body):
        asked = body["messages"][-1]["content"]
        if asked == "refuse":
            return error(429, "Too much waits already.", **{"Retry-After": "7"})
        return sse(self._events(asked))

    async def _events(self, asked):
        yield {
            "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
        }
        pieces = TEXT.split(" ")
        for piece in pieces[:4]:
            await asyncio.sleep(0.02)
            yield chunk(f"{piece} ", is_chat=True)
        while asked == "slowly" and not self.goes_on.is_set():
            await asyncio.sleep(0.02)
            yield chunk("and ", is_chat=True)
        if asked == "die":
            yield {"error": {"message": "The engine died."}}
            return
        yield chunk(" ".join(pieces[4:]), is_chat=True)
        yield chunk(None, is_chat=True, finish="stop")
        yield usage(12, 34)
        yield "[DONE]"


@pytest.fixture(params=[DESK, PHONE], ids=["desk", "phone"])
def size(request):
    return request.param


@pytest.fixture
def page(size):
    stand_in = Chat()
    with chromium(size) as window, serving(stand_in.app) as url:
        found = Page(window, stand_in, url).ready()
        yield found
        stand_in.goes_on.set()
        severe = [line["message"] for line in window.get_log("browser") if line["level"] == "SEVERE"]
        assert not [line for line in severe if "Content Security" in line or "Uncaught" in line]


def test_a_conversation(page, size):
    name = "phone" if size == PHONE else "desk"
    page.shoot(f"{name}-empty")
    assert page.window.switch_to.active_element == page.find("#prompt")
    page.ask("What is water made of?")
    page.ended()
    assert page.texts(".turn.user .text") == ["What is water made of?"]
    assert page.texts(".turn.assistant .text") == [TEXT.split("\n\n")[0], TEXT.split("```\n")[1]]
    assert page.texts(".turn.assistant code") == ["print('<b>H2O</b>')"]  # shown, not obeyed
    assert "first token after" in page.texts(".meta")[-1]
    assert "tok/s" in page.texts(".meta")[-1]
    assert "34 tokens" in page.texts(".meta")[-1]  # the server's count
    from selenium.webdriver import Keys

    page.find("#prompt").send_keys("And", Keys.SHIFT, "\n", Keys.NULL, "salt?")
    assert page.find("#prompt").get_attribute("value") == "And\nsalt?"
    page.ask("")
    page.ended()
    page.shoot(f"{name}-light")
    sent = page.stand_in.bodies[-1]
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "user"]
    assert sent["messages"][1]["content"] == TEXT
    assert sent["messages"][2]["content"] == "And\nsalt?"
    assert not set(sent) & {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "max_tokens",
        "seed",
    }  # the server's own
    assert page.script("document.documentElement.scrollWidth <= window.innerWidth")


def test_escape_stops_and_what_came_stays(page):
    from selenium.webdriver import Keys

    page.ask("slowly")
    page.wait(lambda: "tok/s" in page.texts(".meta")[-1], "speed while it comes")
    assert page.find("#log").get_attribute("aria-busy") == "true"
    page.press(Keys.ESCAPE)
    page.ended()
    assert page.find("#log").get_attribute("aria-busy") == "false"
    assert "stopped" in page.texts(".meta")[-1]
    assert page.texts(".turn.assistant .text")[0].startswith("Water is made of")
    page.wait(lambda: page.stand_in.under_way == 0, "the server notices")
    page.ask("slowly")
    page.find("#stop").click()
    page.ended()
    assert [message["role"] for message in page.stand_in.bodies[-1]["messages"]] == [
        "user",
        "assistant",
        "user",
    ]


def test_settings_are_sent(page, size):
    page.find("#settings summary").click()
    assert page.find("#temperature").get_attribute("placeholder") == "0.7"
    for name, value in {
        "temperature": "0.3",
        "top_k": "40",
        "min_p": "0.05",
        "max_tokens": "99",
        "seed": "7",
    }.items():
        page.find(f"#{name}").send_keys(value)
    page.find("#system").send_keys("Be brief.")
    page.shoot(f"{'phone' if size == PHONE else 'desk'}-settings")
    page.ask("What is water made of?")
    page.ended()
    page.find("#seed").send_keys("-")
    page.find("#prompt").send_keys("Hi\n")
    assert page.texts("#notice") == ["seed is not a number."]
    (sent,) = page.stand_in.bodies
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: sent.get(name) for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")} == {
        "temperature": 0.3, "top_p": None, "top_k": 40, "min_p": 0.05, "max_tokens": 99, "seed": 7,
    }  # fmt: skip


def test_errors_are_what_the_server_says_and_the_question_comes_back(page, size):
    page.find("#prompt").send_keys("refuse\n")
    page.wait(lambda: page.texts("#notice") != [""], "the error")
    assert page.texts("#notice") == ["429: Too much waits already. Try again in 7\u00a0s."]
    assert page.texts(".turn") == []
    assert page.find("#prompt").get_attribute("value") == "refuse"
    page.shoot(f"{'phone' if size == PHONE else 'desk'}-error")
    page.find("#prompt").clear()
    page.ask("die")
    page.wait(lambda: page.texts("#notice") == ["The engine died."], "the error of the stream")
    assert page.texts(".turn.assistant .text") == ["Water is made of "]


def test_edit_and_clear(page):
    page.ask("first")
    page.ended()
    page.ask("second")
    page.ended()
    page.window.find_elements("css selector", ".turn.user button")[1].click()
    assert page.find("#prompt").get_attribute("value") == "second"
    assert len(page.texts(".turn")) == 2
    page.find("#clear").click()
    assert page.texts(".turn") == []
    page.find("#prompt").clear()
    page.ask("third")
    assert [message["content"] for message in page.stand_in.bodies[-1]["messages"]] == ["third"]


def test_light_and_dark(page, size):
    def ground():
        return page.script("getComputedStyle(document.body).backgroundColor")

    light = ground()
    emulate(page.window, size, "dark")
    dark = ground()
    assert dark != light
    page.find("#theme").click()
    assert ground() == light
    page.window.refresh()
    page.ready()
    assert ground() == light  # it is remembered
    page.find("#theme").click()
    assert ground() == dark
    page.find("#facts summary").click()
    page.ask("What is water made of?")
    page.ended()
    page.shoot(f"{'phone' if size == PHONE else 'desk'}-dark-facts")


def test_facts_and_damage(page, size):
    assert page.find("#model").text == FACTS["model"]
    assert page.find("#facts summary").text == "10.02 bits per weight, KL divergence 0.0178"
    page.find("#facts summary").click()
    shown = page.find("#facts-body").text
    for text in (
        "18.236 (+1.74 %)",
        "INT8 channel, inputs INT8 token, at least 39.8 dB SQNR",
        REASON,
        "8,192 tokens",
    ):
        assert text in shown
    page.shoot(f"{'phone' if size == PHONE else 'desk'}-facts")
    assert page.script("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_key_is_asked_for_and_kept_for_the_session(size):
    stand_in = Chat()
    stand_in.wants_key = True
    with chromium(size) as window, serving(stand_in.app) as url:
        page = Page(window, stand_in, url)
        page.wait(lambda: page.find("#key").is_displayed(), "the key is asked for")
        assert page.texts("#notice") == ["This server wants an API key."]
        page.shoot(f"{'phone' if size == PHONE else 'desk'}-key")
        page.find("#key").send_keys("wrong\n")
        page.wait(lambda: page.texts("#notice") == ["401: Incorrect API key provided."], "it is wrong")
        page.find("#key").clear()
        page.find("#key").send_keys(KEY, "\n")
        page.ready()
        assert not page.find("#key").is_displayed()
        window.refresh()
        page.ready()
        assert stand_in.keys == [None, "Bearer wrong", f"Bearer {KEY}", f"Bearer {KEY}"]
        assert page.script("Object.keys(localStorage).length") == 0


def test_everything_is_reached_by_keyboard(page):
    from selenium.webdriver import Keys

    reached = set()
    for _ in range(12):
        page.press(Keys.TAB)
        if page.script("document.activeElement === document.body"):
            continue  # between the last and the first
        reached.add(page.script("document.activeElement.id || document.activeElement.parentElement.id"))
        assert page.script("getComputedStyle(document.activeElement).outlineStyle") != "none", reached
    assert {"clear", "theme", "facts-summary", "settings", "prompt", "send"} <= reached


def test_a_real_server_answers_and_notices_that_it_was_stopped(tmp_path):
    model = save_tiny_chat(tmp_path / "tiny")
    with chromium() as window, real.serving(model, "--served-model-name", "tiny") as server:
        page = Page(window, None, server.url).ready()
        assert page.find("#facts summary").text == "Model"
        page.find("#settings summary").click()
        page.find("#max_tokens").send_keys("5")
        page.ask("Hi")
        page.ended()
        assert "5 tokens, cut off at the limit of tokens" in page.texts(".meta")[-1]
        page.find("#max_tokens").clear()
        page.find("#max_tokens").send_keys("3000")
        page.find("#top_p").send_keys("9")
        page.find("#prompt").send_keys("Hi\n")
        page.wait(lambda: page.texts("#notice")[0].startswith("400: top_p"), "the server's refusal")
        page.find("#top_p").clear()
        page.ask("")
        page.find("#stop").click()
        page.ended()
        assert (
            server.line("request", path="/v1/chat/completions", finish="client_gone")["completion_tokens"]
            < 3000
        )
