"""Finds the data files that ship with quantkit, in an installed wheel or in the source tree."""

from pathlib import Path


def data_dir(name: str) -> Path:
    """The folder `name` (e.g. "recipes"): quantkit/_data of a wheel, else beside the package."""
    package = Path(__file__).parent
    installed = package / "_data" / name
    return installed if installed.is_dir() else package.parent / name
