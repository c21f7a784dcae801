"""What `import keras_xlstm` adds to `import keras`, per backend, and the size of wheel and sdist.

    python benchmarks/import_time.py [--backends jax torch tensorflow] [--repeat 9]

Each import is a process of its own; backends take turns. Bytecode is kept in a folder that one
import before the first fills, as an installation has it.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import record

ROOT = pathlib.Path(__file__).parent.parent
CODE = """
import time
start = time.perf_counter()
import keras
middle = time.perf_counter()
import keras_xlstm
print(middle - start, time.perf_counter() - middle)
"""


def imported(backend, cache):
    env = {
        **os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT),
        "PYTHONPYCACHEPREFIX": cache, "TF_CPP_MIN_LOG_LEVEL": "3",
    }  # fmt: skip
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", CODE]
    result = subprocess.run(command, env=env, cwd=cache, capture_output=True, text=True, check=True)
    return [float(word) for word in result.stdout.split()[-2:]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["jax", "torch", "tensorflow"])
    parser.add_argument("--repeat", type=int, default=9)
    record.option(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for backend in arguments.backends:
            imported(backend, folder)
        times = {backend: [] for backend in arguments.backends}
        for _ in range(arguments.repeat):
            for backend, seen in times.items():
                seen.append(imported(backend, folder))
        print("| backend | import keras | keras_xlstm adds (least, median) |\n|---|---|---|")
        for backend, seen in times.items():
            keras, ours = zip(*seen, strict=True)
            print(
                f"| {backend} | {min(keras):.2f} s "
                f"| {min(ours):.3f} s, {statistics.median(ours):.3f} s |"
            )
            figures = {"least": min(ours), "median": statistics.median(ours)}
            peer = {"import keras": min(keras)}
            record.add(__file__, "import keras_xlstm", "added", "s", figures, peer, backend)
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, str(ROOT)]
        subprocess.run(command, check=True, capture_output=True)
        for file in sorted(pathlib.Path(folder).glob("keras_xlstm-*")):
            print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")
            size = {"file": file.stat().st_size / 1000}
            record.add(__file__, file.suffix.lstrip("."), "size", "kB", size, backend="none")


if __name__ == "__main__":
    main()
