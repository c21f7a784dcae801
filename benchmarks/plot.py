"""Draws docs/_static/cpu.svg from benchmarks/results/cpu.jsonl, for README: `make results`.

The picture holds a digest of its data, by which tests/test_results.py sees whether it is theirs.
"""

import hashlib
import json
import re
import sys

import pages
import render

PICTURE = render.ROOT / "docs/_static/cpu.svg"
LAYERS = {"sLSTM": "tab:blue", "mLSTM": "tab:orange"}
BACKENDS = {"jax": ("o", "JAX"), "tensorflow": ("s", "TensorFlow")}


def data():
    """{(layer, backend): {case: time of a `fit` step, of LSTM's}}, of the newest rows."""
    found = {(layer, backend): {} for layer in LAYERS for backend in BACKENDS}
    for (layer, backend), ratios in found.items():
        where = {"script": "cpu", "backend": backend, "metric": "fit step", "cases": pages.SMALL}
        for row in render.matching(where):
            if " units" not in row["case"] and " steps" not in row["case"]:  # the sweeps
                ratios[row["case"]] = round(row["ours"][layer] / row["peer"]["LSTM"], 3)
    return found


def digest(data):
    text = json.dumps([[*key, *sorted(ratios.items())] for key, ratios in data.items()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main():
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "keras_xlstm", "svg.fonttype": "none", "font.size": 9}
    )
    from matplotlib import pyplot as plt

    found = data()
    cases = list(found["sLSTM", "jax"])
    figure, axes = plt.subplots(figsize=(7.2, 0.28 * len(cases) + 1.1), layout="constrained")
    for (layer, backend), ratios in found.items():
        marker, name = BACKENDS[backend]
        known = [case for case in cases if case in ratios]
        axes.scatter(
            [ratios[case] for case in known], [cases.index(case) for case in known],
            color=LAYERS[layer], marker=marker, label=f"{layer}, {name}",
        )  # fmt: skip
    axes.axvline(1, color="gray", linewidth=1)
    axes.set_xscale("log")
    ticks = (0.1, 0.2, 0.5, 1)
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_yticks(range(len(cases)), [re.sub(": ", ", ", case) for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel("time of a fit step, keras.layers.LSTM = 1 (2 CPU cores)")
    axes.set_title("task, batch, steps, features, units", loc="left", fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    figure.savefig(PICTURE, metadata={"Date": None, "Description": digest(found)})


if __name__ == "__main__":
    sys.exit(main())
