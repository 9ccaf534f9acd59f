"""`quantkit::` operators: a function per device, and little in front of it.

What `torch.library.custom_op` makes checks each call in Python for aliases and gradients: on one machine 52 us in front
of a function that takes 4, 90 where an argument is written, against 11 for an operator that is defined by its schema
alone. A step of a model that is in no CUDA graph calls hundreds.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def on_its_device(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: the device of the first argument, a tensor, is the current one, as launches and their caches ask."""

    @functools.wraps(function)
    def run(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        tensor = cast(torch.Tensor, arguments[0])
        if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
            return function(*arguments, **named)
        with torch.cuda.device(tensor.device):
            return function(*arguments, **named)

    return run


_functions: dict[tuple[Any, str], Callable[..., Any]] = {}  # by operator and kind of device


def for_device(operator: Callable[Arguments, Result], device: torch.device) -> Callable[Arguments, Result]:
    """The function behind an operator, for who needs neither compiler nor tracing: the dispatcher takes 10 to 20 us."""
    return _functions[operator, device.type]


def operator(
    name: str, *, cpu: Callable[..., Any] | None, fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorator: the function becomes what `quantkit::name` does with CUDA tensors; its annotations are the schema.

    cpu, fake: for CPU tensors (None where those take a way without operators), and for tensors without data. mutates:
    names of the arguments that are written. The first argument is a tensor, whose device is the current one meanwhile.
    No gradients, and no result may share memory with an argument.
    """

    def define(cuda: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        full_name = f"quantkit::{name}"
        torch.library.define(full_name, torch.library.infer_schema(cuda, mutates_args=mutates))
        functions = {"cuda": on_its_device(cuda)} | ({} if cpu is None else {"cpu": cpu})
        for kind, function in functions.items():
            torch.library.impl(full_name, kind, function)
        torch.library.register_fake(full_name, fake)
        overload = getattr(torch.ops.quantkit, name).default
        for kind, function in functions.items():
            _functions[overload, kind] = function
        return cast(Callable[Arguments, Result], overload)

    return define
