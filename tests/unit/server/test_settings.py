"""Settings, and sampling defaults of checkpoints, are checked before anything starts."""

import json

import pytest

from quantkit import env
from quantkit.errors import GenerationError, ServerError
from quantkit.server.defaults import read_defaults
from quantkit.server.settings import ServerSettings


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"max_waiting": -1},
        {"max_waiting_tokens": -1},
        {"request_timeout": 0},
        {"drain_seconds": float("inf")},
        {"api_keys": ("",)},
        {"api_keys": ("a\nb",)},
        {"api_keys": ("schlüssel",)},
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ServerError):
        ServerSettings(**wrong)


def test_keys_are_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("QUANTKIT_API_KEYS", "one, two,")
    assert env.api_keys() == ("one", "two")


def test_defaults_are_openais_and_over_them_the_checkpoints(tmp_path):
    assert read_defaults(tmp_path).settings == {"temperature": 1.0, "top_p": 1.0}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_k": 20, "eos_token_id": 1, "do_sample": True}))
    defaults = read_defaults(tmp_path)
    assert defaults.settings == {"temperature": 0.6, "top_p": 1.0, "top_k": 20}
    assert "generation_config.json" in str(defaults)
    file.write_text(json.dumps({"top_p": 7}))
    with pytest.raises(GenerationError, match="top_p"):
        read_defaults(tmp_path)
