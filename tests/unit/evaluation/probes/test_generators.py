"""Every generator: the same items for the same seed, right answers right by an independent check, wrong ones wrong."""

import itertools
import json
import re

import pytest

from quantkit.errors import EvaluationError
from quantkit.evaluation.probes import corpus
from quantkit.evaluation.probes.repetition import distinct, process_results
from quantkit.evaluation.probes.tasks import GENERATORS, load, make_items

SETTINGS = {"cloze": {"words_after": 3}, "needle": {"chars": 3000, "depths": [0.0, 0.5, 1.0]}}
CHOICES = ("arithmetic", "brackets", "cloze", "continuation", "json_closing")
COUNT = 40


def items(generator, count=COUNT, seed="test:0", **settings):
    return make_items(generator, count, seed, SETTINGS.get(generator, {}) | settings)


def answers(item):
    """The right one, and the wrong ones."""
    right = item["choices"][item["answer"]]
    return right, [choice for choice in item["choices"] if choice != right]


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_seed_decides_and_a_limit_takes_the_first(generator):
    found = items(generator)
    assert found == items(generator)
    assert found[:7] == items(generator, 7)
    assert len({json.dumps(item) for item in found}) > COUNT / 2
    if not generator.endswith("_genre") and generator != "opening":
        assert found != items(generator, seed="test:1")


@pytest.mark.parametrize("generator", CHOICES)
def test_choices_are_four_and_distinct_in_any_order(generator):
    found = items(generator, 200)
    assert all(len(item["choices"]) == len(set(item["choices"])) == 4 for item in found)
    places = [item["answer"] for item in found]
    assert all(30 <= places.count(place) <= 70 for place in range(4))  # 50 ± 3.3 standard deviations


@pytest.mark.parametrize("generator", CHOICES)
def test_length_does_not_tell_the_answer(generator):
    found = items(generator, 200)
    for pick in (min, max):
        hits = sum(pick(item["choices"], key=len) == answers(item)[0] for item in found)
        assert hits < 80  # 50 ± 4.9 standard deviations


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_sums_are_right(digits):
    for item in items("arithmetic", digits=digits):
        left, sign, right, _ = item["prompt"].split()
        result = int(left) + int(right) if sign == "+" else int(left) - int(right)
        correct, wrong = answers(item)
        assert int(correct) == result >= 0
        assert all(int(other) != result and len(other) == len(correct) for other in wrong)


@pytest.mark.parametrize("depth", [2, 4, 6])
def test_brackets_close(depth):
    def closes(text):
        while text != (text := re.sub(r"\(\)|\[\]|\{\}", "", text)):
            pass
        return not text

    for item in items("brackets", depth=depth):
        text = item["prompt"].removeprefix("Open: ").removesuffix("\nClose:").replace(" ", "")
        correct, wrong = answers(item)
        assert closes(text + correct.replace(" ", ""))
        assert not any(closes(text + other.replace(" ", "")) for other in wrong)


def test_json_parses_with_the_right_end_alone():
    for item in items("json_closing"):
        correct, wrong = answers(item)
        json.loads(item["prompt"] + correct)
        for other in wrong:
            with pytest.raises(json.JSONDecodeError):
                json.loads(item["prompt"] + other)


def test_what_is_copied_is_in_the_prompt():
    for item in items("copying", pieces=5):
        assert f"Original:{item['target']}\n" in item["prompt"] and len(item["target"].split()) == 5


def test_the_needle_is_where_it_is_said_to_be():
    for item in items("needle"):
        number = item["target"].strip()
        assert item["prompt"].count(number) == 1 and item["prompt"].endswith("is")
        name = re.search(r"secret number of (\w+)\?", item["prompt"]).group(1)
        place = item["prompt"].index(f"The secret number of {name} is {number}.") / len(item["prompt"])
        assert abs(place - item["depth"]) < 0.25  # paragraphs are not cut
        assert 3000 < len(item["prompt"]) < 6000
    assert [item["depth"] for item in items("needle", 4)] == [0.0, 0.5, 1.0, 0.0]


def test_a_cloze_and_a_continuation_are_as_the_text_goes_on():
    paragraphs = corpus.paragraphs()
    for item in [*items("cloze"), *items("continuation")]:
        correct, wrong = answers(item)
        source = [text for text in paragraphs if text.startswith(item["prompt"] + correct)]
        assert source and not any(item["prompt"] + other in source[0] for other in wrong)


def test_the_text_is_not_what_models_are_calibrated_on():
    from quantkit.text import load_documents

    calibration = " ".join(" ".join(load_documents("docs", use="calibrate")).split())
    assert len(corpus.paragraphs()) >= 200 and len(corpus.code()) >= 20
    assert not any(paragraph in calibration for paragraph in corpus.paragraphs())


def test_genres_look_like_themselves():
    table = items("table_genre", 1)[0]["target"].splitlines()
    assert len({line.count("|") for line in table}) == 1
    for row in table[2:]:
        *_, count, price, total = (cell.strip() for cell in row.strip("|").split("|"))
        assert float(total) == pytest.approx(int(count) * float(price), abs=0.006)
    assert isinstance(json.loads(items("json_genre", 1)[0]["target"]), list)
    dialogue = items("dialogue_genre", 1)[0]["target"]
    for name, count in re.findall(r"Assistant: (\w+) ordered (\d+)", dialogue):
        assert re.search(rf"{name} from \w+ ordered {count} ", dialogue)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 1.0), ("one two three", 1.0), ("a b c d", 1.0), ("a b c d a b c d", 4 / 5), ("a " * 13, 1 / 10)],
)
def test_repetition_counts_runs_of_four_words(text, expected):
    assert distinct(text) == pytest.approx(expected)
    words = text.split()
    seen = [tuple(words[start : start + 4]) for start in range(len(words) - 3)]
    repeated = sum(run in seen[:place] for place, run in enumerate(seen))
    assert distinct(text) == pytest.approx(1 - repeated / max(1, len(seen)))
    assert process_results({}, [text]) == {"distinct": distinct(text)}


def test_lm_eval_gets_two_splits_that_share_no_item():
    splits = load(generator="arithmetic", num_items=20, settings={"digits": 3}, version=1, chance=0.25)
    test, examples = ({item["prompt"] for item in splits[name]} for name in ("test", "examples"))
    assert len(splits["test"]) == 20 and not test & examples


def test_an_unknown_generator_is_named():
    with pytest.raises(EvaluationError, match="no probe generator named guess"):
        load(generator="guess", num_items=1)


def test_every_wrong_closing_is_of_the_right_length():
    lengths = [{len(choice) for choice in item["choices"]} for item in items("brackets")]
    assert all(len(found) == 1 for found in lengths)
    assert len(list(itertools.chain(*lengths))) == COUNT
