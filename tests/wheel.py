"""Builds the wheel into FOLDER and installs it in FOLDER/site: python tests/wheel.py FOLDER"""

import pathlib
import subprocess
import sys

if __name__ == "__main__":
    folder, root = pathlib.Path(sys.argv[1]), pathlib.Path(__file__).parent.parent
    python = [sys.executable, "-m"]
    # --no-isolation: the build requirement, setuptools, is in the test extra. Without --wheel the
    # wheel is built from the sdist, which must have all of it.
    build = [*python, "build", "--no-isolation", "--outdir", str(folder), str(root)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    install = [*python, "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "site")]
    subprocess.run([*install, str(wheel)], check=True)
