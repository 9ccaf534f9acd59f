"""On what an evaluation ran: versions and machine, for whoever wants the same figures."""

import os
import platform
from importlib.metadata import version

import torch

from quantkit.version import __version__

PACKAGES = ("transformers", "compressed-tensors")


def describe_environment() -> dict[str, str]:
    """Names and values, in the order to show them."""
    return {
        "quantkit": __version__,
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
        **{package: version(package) for package in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
    }
