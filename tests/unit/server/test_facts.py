"""What the page says of a checkpoint is what its record and its card say."""

import json

import pytest

from quantkit.card import EVALUATION_END, EVALUATION_START
from quantkit.cli.main import run
from quantkit.errors import SourceError
from quantkit.server.facts import read_facts
from tests.tiny_llama import write_tiny_llama

SECTION = "Measured here.\n\n| | original | this model |\n|---|---:|---:|\n| perplexity | 1 | 2 |\n"


@pytest.fixture
def folder(tmp_path):
    source = write_tiny_llama(tmp_path / "tiny")
    assert run(["quantize", str(source), "-r", "int8", "-o", str(tmp_path / "int8")]) == 0
    return tmp_path / "int8"


def test_facts_of_a_quantized_folder(folder):
    plan = json.loads((folder / "quantkit.json").read_text())
    linears = plan["linears"].values()
    facts = read_facts(folder)
    assert sum(scheme["num_linears"] for scheme in facts["schemes"]) == len(linears)
    by_scheme = {scheme["scheme"]: scheme for scheme in facts["schemes"]}
    assert by_scheme["16 bits"]["reason"] == next(
        linear["reason"] for linear in linears if not linear["scheme"]
    )
    quantized = by_scheme["INT8 channel, inputs INT8 token"]
    assert quantized["least_sqnr_db"] == min(linear["sqnr_db"] for linear in linears if linear["scheme"])
    assert 8 < facts["bits_per_weight"] < 16
    assert facts["description"] == plan["recipe"]["description"]
    assert facts["evaluation"] is None
    json.dumps(facts)


def test_the_damage_is_the_cards(folder):
    card = folder / "README.md"
    before = card.read_text().partition(EVALUATION_START)[0]
    card.write_text(f"{before}{EVALUATION_START}\n{SECTION}\n{EVALUATION_END}\n")
    assert read_facts(folder)["evaluation"] == {
        "rows": [("perplexity", "1", "2")],
        "remarks": ["Measured here."],
    }
    card.unlink()
    assert read_facts(folder)["evaluation"] is None


def test_a_checkpoint_of_others_has_none(tmp_path):
    assert read_facts(write_tiny_llama(tmp_path / "tiny")) is None


@pytest.mark.parametrize("record", ["{}", "[]", '{"linears": {}}', '{"linears": {"a": 1}}'])
def test_a_damaged_record_is_named(record, folder):
    (folder / "quantkit.json").write_text(record)
    with pytest.raises(SourceError, match="not what quantkit writes"):
        read_facts(folder)
