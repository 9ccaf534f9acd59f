"""Builds the wheel, installs it into a clean environment, and checks that it finds its recipes.

The clean environment sees this one's dependencies through a .pth file, so that nothing is downloaded twice.
"""

import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path | None = None) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, cwd=cwd).stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, ROOT)
        (wheel,) = folder.glob("quantkit-*.whl")
        environment = folder / "env"
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
        site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        quantkit = environment / "bin" / "quantkit"
        location = run(python, "-c", "import quantkit; print(quantkit.__file__)", cwd=folder).strip()
        assert location.startswith(str(environment)), (
            f"the installed copy is not the one imported: {location}"
        )
        assert "int4-all" in run(quantkit, "recipes", cwd=folder), "the wheel does not find its recipes"
        suites = "from quantkit.evaluation.suites import shipped_suites as s; print(*s())"
        assert "standard" in run(python, "-c", suites, cwd=folder), "the wheel does not find its suites"
        probes = "from quantkit.evaluation.probes import task_folder as f; print(*f().iterdir())"
        found = run(python, "-c", probes, cwd=folder)
        assert "copying.yaml" in found and "_exact" in found, "the wheel does not find its probes"
        tables = "import quantkit_kernels.dispatch as d; print(*d.SHIPPED.glob('*.json'))"
        assert run(python, "-c", tables, cwd=folder).strip(), "the wheel has no table of routes"
        page = "from quantkit.server.page import HTML; print(HTML.decode())"
        assert "<title>quantkit</title>" in run(python, "-c", page, cwd=folder), "the wheel has no chat page"
        run(quantkit, "--help", cwd=folder)
        started = time.perf_counter()
        run(quantkit, "--help", cwd=folder)
        print(f"{wheel.name}: installs, finds its recipes; --help in {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    main()
