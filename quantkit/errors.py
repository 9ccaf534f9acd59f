"""The errors a user can cause: what was found and where, and what to type next.

Everything raised on purpose for the user derives from QuantkitError; the command line prints it as two
lines and exits with 2. A bug of ours is an AssertionError or whatever Python raises, with its traceback.
"""


class QuantkitError(Exception):
    """A user's mistake or an impossible request: `problem` names the place and the finding, `fix` the way out."""

    def __init__(self, problem: str, *, fix: str) -> None:
        super().__init__(problem, fix)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem}\n  fix: {self.fix}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.problem, self.fix)


def _rebuild(kind: type[QuantkitError], problem: str, fix: str) -> QuantkitError:
    return kind(problem, fix=fix)


def first_line(error: Exception) -> str:
    """What another package's error says first, or, where it says nothing, its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class SourceError(QuantkitError):
    """The checkpoint to read is missing, damaged, or of a kind that cannot be read."""


class RecipeError(QuantkitError):
    """The recipe, a `--set`, or what it asks of this checkpoint is wrong."""


class SchemeError(QuantkitError):
    """A combination of number formats that no loader or kernel can run."""


class OutputError(QuantkitError):
    """The output folder cannot be written, or holds something else."""


class TextError(QuantkitError):
    """The text to evaluate or calibrate on is missing, empty, or unreadable."""


class CalibrationError(QuantkitError):
    """The calibration text, or what the model makes of it, cannot be used."""


class UnsupportedModelError(QuantkitError):
    """The runtime has no definition for this architecture, or not for a feature it uses."""


class MemoryPlanError(QuantkitError):
    """The device has not the memory for what is asked of it."""


class EvaluationError(QuantkitError):
    """Reference and candidate cannot be compared."""


class GenerationError(QuantkitError):
    """A prompt that the model cannot take, or sampling settings that make no sense."""


class BenchError(QuantkitError):
    """A benchmark that cannot be run as asked, or a dispatch table that it cannot update."""


class ServerError(QuantkitError):
    """A server that cannot be started as asked, or whose engine has died."""
