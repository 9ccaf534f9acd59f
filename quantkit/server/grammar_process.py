"""A process that looks at clients' grammars: it can be ended when one takes too long, or too much memory.

python -m quantkit.server.grammar_process: a line with `null` when it is ready; then, for each line with a grammar, one
with what is wrong with it, or `null`. Lines are JSON.
"""

import json
import resource
import signal
import sys

from quantkit.runtime.grammar import problem_of

MEMORY_BYTES = 4 << 30


def main() -> None:
    """Until there are no more lines."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the HTTP process
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    _say(None)
    for line in sys.stdin:
        _say(problem_of(json.loads(line)))


def _say(answer: str | None) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
