"""The command line as a whole."""

import subprocess
import sys

from quantkit.cli.main import run


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from quantkit.cli.main import run; assert run(['--help']) == 0; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "quantize" in done.stdout


def test_help_names_the_variable_of_the_keys_whole(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    assert run(["serve", "--help"]) == 0
    assert "QUANTKIT_API_KEYS" in capsys.readouterr().out
