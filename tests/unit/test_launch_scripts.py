"""The launch scripts start from a checkout that nobody has installed, wherever they are started from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hift_testing.selection import slow

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.py"))
# As in an interpreter without the package: no finder of an editable install, no other folder on the path.
HIDE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]; "
WHERE = "import hift_ds, hift_kernels; print(hift_ds.__file__, hift_kernels.__file__, sep='\\n')"


def alone(code, folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", HIDE + code, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


def test_without_a_script_the_package_is_hidden(tmp_path):
    """Else the next test could not fail."""
    assert str(ROOT / "hift_ds") not in alone(WHERE, tmp_path).stdout


@pytest.mark.parametrize("name", [name if name == "train.py" else slow(name) for name in SCRIPTS])
def test_a_script_finds_the_packages_of_its_checkout(name, tmp_path):
    path = str(ROOT / "launch" / name)
    code = f"import runpy; sys.argv[0] = {path!r}\ntry: runpy.run_path({path!r}, run_name='__main__')\n"
    code += f"except SystemExit as end: assert end.code == 0\n{WHERE}"
    done = alone(code, tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    found = [Path(line) for line in done.stdout.splitlines()[-2:]]
    assert found == [ROOT / "hift_ds/__init__.py", ROOT / "kernels/hift_kernels/__init__.py"]
