"""Skill probes: lm-eval tasks made from a seed and from the text that ships with Python, so that nothing is downloaded.

The tasks are the YAML files in `eval/probes/`; a file names a generator of this package, its settings, and under
`metadata.chance` what guessing scores. Nothing here knows how a model runs.
"""

from pathlib import Path

from quantkit.resources import data_dir


def task_folder() -> Path:
    """Where lm-eval finds the probes: its `include_path`."""
    return data_dir("eval") / "probes"
