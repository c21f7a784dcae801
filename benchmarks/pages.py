"""What the pages show of benchmarks/results/*.jsonl, for render.py.

A table has the fields of its rows (script, device, backend, `cases`: a pattern), what a line is
about (`by` the values of fields, or `rows` one by one), and columns, each of figures: `of` which
names, in which form, with which goal. Without columns it is one figure within a sentence.
"""

H200, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
PASSES = ("fw", "fw+bw")
MS = [[{"metric": metric, "of": "triton", "form": "{:.3f}"}] for metric in PASSES]


def beside(peer, *goals, ours="triton", metrics=PASSES):
    """How many times ours the peer's time is, in each pass."""
    goals = goals or (None,) * len(metrics)
    return [
        {"metric": metric, "of": f"{peer} / {ours}", "form": "x", "goal": goal and f">= {goal}"}
        for metric, goal in zip(metrics, goals, strict=True)
    ]


def step(script, ours, peer, goal):
    part = {"script": script, "metric": "step"}
    share = {"of": f"copy / {ours}", "form": "{:.0%}", "goal": {"B 64": f">= {goal}"}}
    figures = {"of": ours, "form": "{:.3f}"}, share, {"of": f"{peer} / {ours}", "form": "x"}
    return [[{**part, **figure}] for figure in figures]


# Layers in small models on CPUs: of LSTM's time, and the goals.

SMALL = r": [\d ]+$"
RANGE = "least and most$"  # of several shapes, where single ones were not kept
WIDE = {r"(128|256|512)$": "<= 0.5", "": "<= 1"}


def layer(name, goals):
    kinds = zip(("fit step", "predict step", "first step"), goals, strict=True)
    return [{"metric": kind, "of": f"{name} / LSTM", "goal": goal} for kind, goal in kinds]


def small(backend, *names):
    lstm = [
        {"metric": f"{kind} step", "of": "LSTM", "form": "{:.1f}"}
        for kind in ("fit", "predict", "first")
    ]
    goals = {"s": ("<= 1", "<= 1"), "m": (WIDE, WIDE), "st": ("<= 4", "<= 4")}
    columns = [layer(n, (*goals["st" if n[:2] == "st" else n[0]], "<= 1.5")) for n in names]
    return {
        "script": "cpu", "backend": backend, "cases": SMALL, "by": ["case"],
        "head": ["B T F units", "LSTM, ms", *names], "columns": [lstm, *columns],
        "options": f" --only {backend} --shapes tutorials sweeps",
    }  # fmt: skip


H100_LIMIT_CHUNK = {
    "script": "gpu_torch", "device": H100, "cases": "128/256|256/512", "of": "limit_chunk / triton", "form": "x"
}  # fmt: skip
LAYERS = ("sLSTM", "sLSTM, 4 heads", "mLSTM", "mLSTM, 4 heads", "stack of 2")
FASTER = ("label", "script", "cases", "peer")
SWAP = {"script": "swap", "not counted": ("parity", "recall", "adding 200")}
COMPILE = {"script": "tensorflow_xla", "cases": "^12 blocks"}

FIT = {
    "script": "cpu",
    "backend": "jax",
    "cases": SMALL,
    "metric": "fit step",
    "form": "{:.2f}",
    "goal": "<= 1",
}
SERVING = {"script": "gpu_generation", "cases": "^xLSTM-7B, 32 blocks"}
SERVED = (
    *((f"decode, {b} text{'s' * (b > 1)}", f"decode {b}", 1.3) for b in (1, 16, 64)),
    ("prefill 1 x 128", "prefill 1x128", 4.8), ("prefill 1 x 2048", "prefill 1x2048", 1.6),
    ("prefill 1 x 16384", "prefill 1x16384", 1.35), ("prefill 8 x 2048", "prefill 8x2048", 1.35),
)  # fmt: skip
OFFICIAL = "tokens/s, the official model under `torch.compile` = 1"
DEFAULTS = (
    (
        "`sLSTM(units)`, 8 to 512 units, CPU | time of a `fit` step, `keras.layers.LSTM` = 1",
        {**FIT, "of": "sLSTM / LSTM"},
    ),
    ("`mLSTM(units)`, the same | the same", {**FIT, "of": "mLSTM / LSTM"}),
    (
        f"`xLSTMLanguageModel`, 407M parameters, `fit` on JAX, GPU | {OFFICIAL}",
        {"script": "gpu_jax", "of": "ours-compiled / official-compiled"},
    ),
    (
        "… on torch, `jit_compile=True` | the same",
        {"script": "gpu_model", "device": H200, "of": "ours-compiled / official-compiled"},
    ),
    (
        "… on torch, by default | tokens/s, `jit_compile=True` = 1",
        {"script": "gpu_model", "device": H200, "of": "ours / ours-compiled"},
    ),
    (
        "… on texts of 2,048 to 65,536 tokens | tokens/s, a Transformer of equal size = 1",
        {"script": "gpu_context", "cases": "", "of": "torch / llama"},
    ),
    (
        "xLSTM-7B, a new token of one text, GPU | speed, Hugging Face's model = 1",
        {**SERVING, "metric": "decode 1", "of": ["hugging-face / torch", "hugging-face / jax"]},
    ),
    (
        "mLSTM's kernel, 2,048 to 65,536 steps, GPU | speed, a Transformer's attention (cuDNN) = 1",
        {
            "script": "gpu_torch",
            "cases": r"^mLSTM \d.*128/256",
            "metric": "fw+bw",
            "of": "attention / triton",
        },
    ),
)
RATIO = {"metric": "training", "cases": "2048$", "form": "{:.1f}", "goal": ">= 1"}

TABLES = {
    "defaults": {
        "head": ["you write", "measure", "you get"], "columns": [[{}]], "source": False,
        "rows": [{"label": label, **RATIO, **where} for label, where in DEFAULTS],
    },
    # Kernels on GPUs.
    "speed": {
        "device": H200, "source": False,
        "head": ["NVIDIA H200, bfloat16", "beside", "forward", "forward + backward"],
        "columns": [[part] for part in beside("{peer}")],
        "rows": [dict(zip(FASTER, row, strict=True)) for row in (
            ("mLSTM, heads of 128/256 | `mlstm_kernels`, limit_chunk", "gpu_torch", "128/256", "limit_chunk"),
            ("mLSTM, heads of 256/512 | the same", "gpu_torch", "256/512", "limit_chunk"),
            ("mLSTM, heads of 64/128, in a CUDA graph | the same", "gpu_torch", "64/128, as", "limit_chunk"),
            ("mLSTM, heads of 64/128, launched one by one | the same", "gpu_torch", "64/128$", "limit_chunk"),
            ("mLSTM, heads of 128/256 | its kernel with a sigmoid gate", "gpu_torch", "128/256", "xl_chunk_siging"),
            ("sLSTM, heads of 64 | FlashRNN, Triton", "gpu_slstm", "x64$", "triton_fused"),
            ("sLSTM, heads of 192 to 768 | FlashRNN, CUDA", "gpu_slstm", "x(192|256|768)$", "cuda"),
            ("sLSTM, heads of 64 to 768 | `torch.nn.LSTM`, cuDNN", "gpu_slstm", "", "cudnn"),
            ("mLSTM on JAX | `mlstm_kernels`, plain XLA", "gpu_jax", "^mLSTM", "xla"),
            ("sLSTM on JAX | our native form", "gpu_jax", "^sLSTM", "native"),
        )],
    },
    "mlstm_torch": {
        "script": "gpu_torch", "device": H200, "cases": r"^mLSTM \d", "by": ["case"], "strip": "mLSTM ",
        "head": ["B heads T d_qk/d_v", "fw, ms", "fw+bw, ms", "limit_chunk (goal: 3.5x)",
                 "sigmoid gate (goal: 2.8x, 2.7x)", "causal attention"],
        "columns": [*MS, beside("limit_chunk", 3.5, 3.5), beside("xl_chunk_siging", 2.8, 2.7), beside("attention")],
    },
    "h100_fw": {**H100_LIMIT_CHUNK, "metric": "fw"},
    "h100_both": {**H100_LIMIT_CHUNK, "metric": "fw+bw"},
    "mlstm_jax": {
        "script": "gpu_jax", "device": H200, "cases": r"^mLSTM \d", "by": ["case"], "strip": "mLSTM ",
        "head": ["B heads T d_qk/d_v", "fw, ms", "fw+bw, ms", "plain XLA (goal: 5x)", "native", "Pallas"],
        "columns": [*MS, beside("xla", 5, 5), beside("native"), beside("pallas")],
    },
    "slstm": {
        "script": "gpu_slstm", "device": H200, "by": ["case"], "strip": "sLSTM ",
        "head": ["B T heads x units", "fw, fw+bw, ms", "FlashRNN, Triton (goal: 1.7x)", "FlashRNN, CUDA (7x, 4x)",
                 "nn.LSTM, cuDNN (1x)", "JAX, ms", "native on JAX (5x)"],
        "columns": [
            [part for column in MS for part in column], beside("triton_fused", 1.7, 1.7), beside("cuda", 7, 4),
            beside("cudnn", 1, 1), [{**part, "script": "gpu_jax"} for column in MS for part in column],
            [{**part, "script": "gpu_jax"} for part in beside("native", 5, 5)],
        ],
    },
    "steps": {
        "script": "gpu_torch", "cases": "^mLSTM step", "by": ["case"], "strip": "mLSTM step, ", "options": " --only step",
        "head": ["one step", "PyTorch, ms", "of a copy (goal: 95 %)", "mlstm_kernels",
                 "JAX (Pallas), ms", "of a copy (goal: 85 %)", "native"],
        "columns": step("gpu_torch", "triton", "mlstm_kernels", 95) + step("gpu_jax", "pallas", "native", 85),
    },
    # Whole models.
    "training": {
        "head": ["`model.fit`", "GPU", "tokens/s", "official, torch.compile", "ours is", "peak GiB"],
        "rows": [
            {"label": f"JAX | {H200}", "script": "gpu_jax", "device": H200, "goal": ">= 1.4"},
            {"label": f"PyTorch, `jit_compile=True` | {H200}", "script": "gpu_model", "device": H200, "goal": ">= 1.3"},
            {"label": f"PyTorch, `jit_compile=True` | {H100}", "script": "gpu_model", "device": H100, "goal": ">= 1.3"},
            {"label": f"PyTorch, by default, with a C++ compiler | {H200}", "script": "gpu_model", "device": H200, "own": "ours", "beside": "-"},
            {"label": f"PyTorch, by default, without one | {H200}", "script": "gpu_model", "device": H200, "own": "ours-captured", "beside": "-"},
            {"label": f"PyTorch, `jit_compile=False` | {H100}", "script": "gpu_model", "device": H100, "goal": ">= 1", "own": "ours"},
        ],
        "own": "ours-compiled", "beside": "official-compiled", "cases": "2048$",
        "columns": [
            [{"metric": "training", "of": "{own}", "form": "{:,.0f}", "goal": None}],
            [{"metric": "training", "of": "{beside}", "form": "{:,.0f}", "goal": None}],
            [{"metric": "training", "of": "{own} / {beside}", "form": "{:.2f}x"}],
            [{"metric": "peak memory", "of": "{own}", "form": "{:.1f}", "goal": None}],
        ],
    },
    "serving": {
        **SERVING, "head": ["xLSTM-7B, ms", "PyTorch", "of the floor (goal)", "JAX", "of the floor (goal)", "Hugging Face"],
        "rows": [{"label": label, "metric": metric, "goal": f"<= {goal}"} for label, metric, goal in SERVED],
        "columns": [part for own in ("torch", "jax") for part in (
            [{"of": own, "form": "{:.2f}", "goal": None}], [{"of": f"{own} / floor"}],
        )] + [[{"of": "hugging-face", "form": "{:.1f}", "goal": None}]],
    },
    "gpu_layers": {
        "script": "gpu_layers", "by": ["case", "metric"], "strip": "jit_compile=auto, B T F units ",
        "head": ["", "LSTM, ms", *(GPU_LAYERS := ("sLSTM", "sLSTM, heads of 64", "mLSTM", "mLSTM, heads of 64", "stack of 2"))],
        "columns": [[{"of": "LSTM", "form": "{:.2f}"}], *(
            [{"of": f"{name} / LSTM", "goal": "<= 0.6" if name[0] == "m" else "<= 1" if name[:2] == "sL" else None}]
            for name in GPU_LAYERS
        )],
    },
    **{f"context_{length}": {
        "script": "gpu_context", "metric": "training", "cases": f" {length}$", "of": "torch / llama", "form": "{:.2f}",
        "goal": f">= {goal}",
    } for length, goal in ((2048, 1.05), (8192, 1.5), (65536, 4))},
    "fastest_official": {
        "script": "gpu_model", "cases": "the fastest host$", "of": "official-compiled", "form": "{:,.0f} tokens/s",
    },
    "devices": {"script": "gpu_devices", "metric": "efficiency", "of": "2", "form": "{:.0f} %"},
    "decoding": {"script": "generation", "metric": "one more token", "device": H100, "of": "auto", "form": "{:.1f} ms"},
    "decoding_eager": {"script": "generation", "metric": "one more token", "device": H100, "of": "false", "form": "{:.0f} ms"},
    # CPUs.
    "small_jax": small("jax", *LAYERS),
    "small_tensorflow": small("tensorflow", "sLSTM", *LAYERS[2:]),
    "cost": {
        "script": "cpu", "source": False,
        "head": ["fit, predict, first step", "JAX", "TensorFlow", "torch"],
        "columns": [[
            {"backend": backend, "metric": f"{kind} step", "goal": f"<= {1.5 if kind == 'first' else goal}"}
            for kind in ("fit", "predict", "first")
        ] for backend, goal in (("jax", 1), ("tensorflow", 1), ("torch", 0.5))],
        "rows": [
            {"label": words, "of": [f"{name} / LSTM" for name in names], "cases": cases}
            for words, names, cases in (
                ("`sLSTM`", LAYERS[:2], f"{SMALL}|{RANGE}"), ("`mLSTM`", LAYERS[2:4], f"{SMALL}|{RANGE}"),
                ("`mLSTM`, `return_sequences`", LAYERS[2:4], "return_sequences$"),
                ("`xLSTMStack` of 2 blocks", LAYERS[4:], f"{SMALL}|{RANGE}"),
            )
        ],
    },
    "sequences": {
        "script": "cpu", "cases": "return_sequences$", "metric": "fit step", "by": ["backend", "case"],
        "head": ["", "LSTM, ms", *LAYERS[:4]], "options": " --sequences", "strip": ", return_sequences$",
        "columns": [[{"of": "LSTM", "form": "{:.1f}"}], *(
            [{"of": f"{name} / LSTM", "goal": "<= 1" if name[0] == "s" else "<= 0.5"}] for name in LAYERS[:4]
        )],
    },
    "official": {
        "script": "cpu", "cases": "LSTM B", "by": ["case"], "options": " --only official",
        "head": ["", "fw, ms", "fw+bw, ms", "`xlstm` vanilla", "native_autograd", "native_autograd, our layout"],
        "columns": [
            *([{"metric": m, "of": "ops", "form": "{:.1f}"}] for m in ("forward", "forward+backward")),
            *(beside(peer, 1, 1, ours="ops", metrics=("forward", "forward+backward"))
              for peer in ("xlstm vanilla", "native_autograd", "native_autograd, our layout")),
        ],
    },
    # TensorFlow and XLA.
    "turns": {"script": "tensorflow_xla", "metric": "in turn", "of": "all compiled / jax"},
    "compile": {
        **COMPILE, "metric": "compiling", "by": ["case"], "options": " --only compile",
        "head": ["s of processor time, peak MiB", "`jit_compile=True` (goal: 20 s)", "the whole step compiled", "`jit_compile=False`"],
        "columns": [
            [{"metric": "compiling", "of": way, "form": "{:.1f}", "goal": "<= 20" if way == "jit" else None},
             {"metric": "peak memory", "of": way, "form": "{:,.0f}"}]
            for way in ("jit", "whole", "graph")
        ],
    },
    "compiling": {**COMPILE, "metric": "compiling", "of": "jit", "form": "{:.0f}"},
    "stepping": {"script": "tensorflow_xla", "metric": "fit step", "of": "jit / whole"},
    # Memory.
    "generation": {
        "script": "generation", "metric": "one more token", "by": ["backend"], "cases": "^4 blocks of 256",
        "head": ["ms a token, after", *(contexts := ("100", "1,000", "10,000", "100,000"))],
        "columns": [[{"case": f"4 blocks of 256, after {n} tokens", "of": "auto"}] for n in contexts],
    },
    "load": {"script": "load_7b", "metric": "memory held", "of": "from_pretrained / files"},
    # Errors.
    "errors": {
        "script": "gpu_torch", "cases": "heads of", "by": ["case"], "options": " --only errors", "strip": ", 1,024 steps",
        "head": ["Triton, native", *(results := ("h", "dq", "dk", "dv", "di", "df"))],
        "columns": [
            [{"metric": f"error of {x}", "of": of, "form": "{:.1e}"} for of in ("triton", "native")] for x in results
        ],
    },
    "error_of_h": {"script": "gpu_torch", "metric": "error of h", "of": "triton", "form": "{:.1e}"},
    "stream": {
        "script": "long_stream", "by": ["case", "backend"], "strip": ", 1,000,000 tokens",
        "head": ["", "error in chunks: last, worst", "one by one", "MiB after two chunks, at the end"],
        "columns": [
            *([{"metric": f"error {how}", "of": of, "form": "{:.1e}"} for of in ("last", "worst")]
              for how in ("in chunks", "one by one")),
            [{"metric": "resident memory", "of": when, "form": "{:,.0f}"} for when in ("begin", "end")],
        ],
    },
    # Imports, sizes, losses.
    "imports": {
        "script": "import_time", "metric": "added", "by": ["backend"],
        "head": ["backend", "`import keras`", "`import keras_xlstm` adds, least", "median"],
        "columns": [[{"of": "import keras", "form": "{:.2f} s"}], *(
            [{"of": of, "form": "{:.3f} s"}] for of in ("least", "median")
        )],
    },
    "wheel": {"script": "import_time", "case": "whl", "of": "file", "form": "{:.0f} kB"},
    "sdist": {"script": "import_time", "case": "gz", "of": "file", "form": "{:.0f} kB"},
    "swap_slow": {**SWAP, "cases": r"Adam\(0.001\)"},
    "swap_fast": {**SWAP, "cases": r"Adam\(0.01\)"},
}  # fmt: skip
