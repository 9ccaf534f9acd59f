"""Where tables go: stdout, which a file or a pipe makes wide enough for the names of tensors."""

from rich.console import Console

PIPE_WIDTH = 120


def table_console() -> Console:
    """Stdout; as wide as the terminal, or elsewhere at least PIPE_WIDTH columns."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    return console
