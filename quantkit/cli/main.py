"""The `quantkit` command: registers the verbs and turns errors into two lines and an exit code.

Exit codes: 0 done, 1 a gate failed, 2 the user's mistake or an impossible request, 130 interrupted.
Importing this imports neither torch nor transformers; each verb imports what it needs when it runs.
"""

import errno
import sys
from typing import cast

import typer

from quantkit.cli.bench import bench
from quantkit.cli.chat import chat
from quantkit.cli.eval import eval_models
from quantkit.cli.generate import generate
from quantkit.cli.inspect import inspect
from quantkit.cli.quantize import quantize
from quantkit.cli.recipes import recipes
from quantkit.cli.serve import serve
from quantkit.cli.verify import verify
from quantkit.env import keep_freed_memory
from quantkit.errors import OutputError, QuantkitError
from quantkit.version import __version__

# click's UsageError, of the copy of click that newer versions of typer carry inside
UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__bases__[0])

INTERRUPTED = 130

app = typer.Typer(
    name="quantkit",
    help="Quantize a language model, measure what it cost, and run the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"quantkit {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Quantize a language model, measure what it cost, and run the result."""


app.command("inspect")(inspect)
app.command("quantize")(quantize)
app.command("verify")(verify)
app.command("eval")(eval_models)
app.command("generate")(generate)
app.command("chat")(chat)
app.command("serve")(serve)
app.command("recipes")(recipes)
app.add_typer(bench)


def main() -> None:
    """Run the command line; never returns."""
    keep_freed_memory()
    sys.exit(run())


def run(arguments: list[str] | None = None) -> int:
    """Run one command line (default: this process's own) and return its exit code."""
    try:
        result = app(args=arguments, standalone_mode=False)
    except UsageError as error:
        if error.format_message():  # empty where no argument at all was given: the help has been printed
            command = error.ctx.command_path if error.ctx else "quantkit"
            fix = f"see `{command} --help`"
            if error.format_message().startswith("No such option"):
                fix += "; what begins with a dash and is no option goes behind `--`"
            print(f"error: {error.format_message()}\n  fix: {fix}", file=sys.stderr)
        return 2
    except QuantkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit:  # of typer, when the reader of our output has left: nothing more to say
        return 0
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        print(f"error: {_disk_error(error)}", file=sys.stderr)
        return 2
    if result == INTERRUPTED:  # typer makes this number of a KeyboardInterrupt, without a word
        print("interrupted", file=sys.stderr)
    return result if isinstance(result, int) else 0


_DISK_ERRORS = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        "free some space, then run the same command again: finished work is kept",
    ),
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM), "give a folder that you may write to (or read from)"
    ),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP), "give a path that can exist"
    ),
    errno.EIO: "check the disk, then run the same command again: finished work is kept",
}


def _disk_error(error: OSError) -> OutputError:
    place = f"{error.filename}: " if error.filename else ""
    return OutputError(f"{place}{error.strerror}", fix=_DISK_ERRORS[error.errno or 0])
