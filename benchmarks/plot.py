"""Draws docs/_static/*.svg from benchmarks/results/*.jsonl: `make results`.

A picture holds a digest of its data, by which tests/test_results.py sees whether it is theirs.
"""

import hashlib
import json
import re
import sys

import pages
import render

PICTURES = render.ROOT / "docs/_static"
LAYERS = {"sLSTM": "tab:blue", "mLSTM": "tab:orange"}
BACKENDS = {"jax": ("o", "JAX"), "tensorflow": ("s", "TensorFlow")}
FAMILIES = {
    "torch": ("xLSTM, this package on PyTorch", "tab:blue", "o-"),
    "llama": ("Transformer, flash attention, torch.compile", "gray", "s--"),
}
PANELS = {"training": "training, 1,000 tokens/s", "peak memory": "peak memory, GiB"}


def cpu_data():
    """{"layer, backend": {case: time of a `fit` step, of LSTM's}}, of the newest rows."""
    found = {f"{layer}, {backend}": {} for layer in LAYERS for backend in BACKENDS}
    for key, ratios in found.items():
        layer, backend = key.split(", ")
        where = {"script": "cpu", "backend": backend, "metric": "fit step", "cases": pages.SMALL}
        for row in render.matching(where):
            if " units" not in row["case"] and " steps" not in row["case"]:  # the sweeps
                ratios[row["case"]] = round(row["ours"][layer] / row["peer"]["LSTM"], 3)
    return found


def context_data():
    """{metric: {family: {tokens of a sequence: figure}}}, of the newest rows."""
    found = {metric: {family: {} for family in FAMILIES} for metric in PANELS}
    for metric, families in found.items():
        for row in render.matching({"script": "gpu_context", "metric": metric}):
            length = int(row["case"].split()[-1])
            for family, figure in (row["ours"] | row["peer"]).items():
                if family in families:
                    families[family][length] = figure
    return found


def draw_cpu(plt, found):
    cases = list(found["sLSTM, jax"])
    figure, axes = plt.subplots(figsize=(7.2, 0.28 * len(cases) + 1.1), layout="constrained")
    for key, ratios in found.items():
        layer, backend = key.split(", ")
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
    return figure


def draw_context(plt, found):
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 2.7), layout="constrained")
    lengths = sorted({n for families in found.values() for x in families.values() for n in x})
    for axes, (metric, families) in zip(panels, found.items(), strict=True):
        scale = 1e-3 if metric == "training" else 1.0
        for family, figures in families.items():
            name, color, style = FAMILIES[family]
            known = sorted(figures)
            y = [figures[n] * scale for n in known]
            axes.plot(known, y, style, color=color, label=name if metric == "training" else None)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens of a sequence")
        axes.set_title(PANELS[metric], loc="left", fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return figure


DRAWN = {"cpu": (cpu_data, draw_cpu), "context": (context_data, draw_context)}


def digest(name):
    data = DRAWN[name][0]()
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def main():
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "keras_xlstm", "svg.fonttype": "none", "font.size": 9}
    )
    from matplotlib import pyplot as plt

    for name, (data, draw) in DRAWN.items():
        metadata = {"Date": None, "Description": digest(name)}
        draw(plt, data()).savefig(PICTURES / f"{name}.svg", metadata=metadata)


if __name__ == "__main__":
    sys.exit(main())
