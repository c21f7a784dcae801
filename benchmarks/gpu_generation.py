"""Serving xLSTM-7B (or fewer of its blocks) in bfloat16 on one NVIDIA GPU, with random weights.

    python benchmarks/gpu_generation.py [torch torch-compiled torch-int8 jax jax-int8 hugging-face]
        [--blocks 8] [--record]

A decode step: ms a token, from texts of 66 and of 2 new tokens, for each batch. A prefill: ms of a
prompt with one new token; the first call, and the least of three later ones. The floors: bytes of
weights and of states, read and written, over the rate of a large copy; products of the prefill over
the rate of a large one; both rates of the same run. "torch-compiled" is `jit_compile=True`, "int8"
after `model.quantize("int8")`, beside the floors of bfloat16. Hugging Face's model runs by
`mlstm_kernels`. Each family runs in a process of its own.
"""

import argparse
import json
import os
import sys
import time

import record

DECODES = ((1, 128), (16, 128), (64, 128))
PREFILLS = ((1, 128), (1, 2048), (1, 16384), (8, 2048))
FAMILIES = ("torch", "torch-compiled", "torch-int8", "jax", "jax-int8", "hugging-face")
VOCABULARY = 50304


def seconds(f, *arguments):
    start = time.perf_counter()
    f(*arguments)
    return time.perf_counter() - start


def ours(blocks, jit_compile, in_bytes):
    import keras
    import numpy as np

    from keras_xlstm.models import configs, xLSTMLanguageModel

    keras.config.set_dtype_policy("bfloat16")
    config = configs.xlstm_7b()
    model = xLSTMLanguageModel(**{**config, "num_blocks": blocks or config["num_blocks"]})
    if in_bytes:
        model.quantize("int8")
    rng = np.random.default_rng(0)

    def generate(batch, length, new):
        prompts = rng.integers(0, VOCABULARY, (batch, length))
        model.generate(prompts, new, temperature=0, jit_compile=jit_compile)

    return generate, model.count_params()


def hugging_face(blocks):
    import torch
    from transformers import xLSTMConfig, xLSTMForCausalLM

    config = xLSTMConfig(
        vocab_size=VOCABULARY, hidden_size=4096, embedding_dim=4096, num_blocks=blocks or 32,
        num_hidden_layers=blocks or 32, num_heads=8, mode="inference", step_kernel="triton",
        chunkwise_kernel="chunkwise--triton_limit_chunk", return_last_states=True,
        sequence_kernel="native_sequence__triton", autocast_kernel_dtype="bfloat16",
        inference_state_dtype="float32",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = xLSTMForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)

    def generate(batch, length, new):
        ids = torch.randint(0, VOCABULARY, (batch, length), device="cuda")
        with torch.no_grad():
            options = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
            model.generate(ids, **options, pad_token_id=0)
        torch.cuda.synchronize()

    return generate, sum(p.numel() for p in model.parameters())


def floors(blocks):
    """{case: ms}, of the 7B model's blocks and head."""
    import torch
    from triton.testing import do_bench

    x = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    bytes_ms = 2 * x.numel() / do_bench(lambda: y.copy_(x), return_mode="median")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    flops_ms = 2 * 8192**3 / do_bench(lambda: a @ a, return_mode="median")
    width, hidden = 4096, 10944
    weights = blocks * (width * width * 4 + 3 * width * hidden) + width * VOCABULARY
    state = blocks * 8 * 256 * 512 * 4
    found = {f"decode {b}": (2 * weights + 2 * b * state) / bytes_ms for b, _ in DECODES}
    for b, t in PREFILLS:
        products = 2 * b * t * (weights - width * VOCABULARY) / flops_ms
        found[f"prefill {b}x{t}"] = max(products, 2 * weights / bytes_ms)
    return found


def measure(family, blocks):
    compiled = family.endswith("compiled")
    if family == "hugging-face":
        generate, parameters = hugging_face(blocks)
    else:
        generate, parameters = ours(blocks, compiled or "auto", family.endswith("int8"))
    print(f"{family}: {parameters:,} parameters", file=sys.stderr)
    found, first = {}, {}
    for batch, length in DECODES:
        first[f"decode {batch}"] = seconds(generate, batch, length, 8) * 1e3
        short = min(seconds(generate, batch, length, 2) for _ in range(2))
        long = min(seconds(generate, batch, length, 66) for _ in range(2))
        found[f"decode {batch}"] = (long - short) / 64 * 1e3
    for batch, length in PREFILLS:
        case = f"prefill {batch}x{length}"
        first[case] = seconds(generate, batch, length, 1) * 1e3
        found[case] = min(seconds(generate, batch, length, 1) for _ in range(4)) * 1e3
    print(json.dumps({"found": found, "first": first}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help=f"of {FAMILIES}; all if left out")
    parser.add_argument("--blocks", type=int, default=0, help="in place of 32")
    parser.add_argument("--family", help=argparse.SUPPRESS)
    record.option(parser)
    arguments = parser.parse_args()
    if arguments.family:
        return measure(arguments.family, arguments.blocks)
    from gpu_torch import environment, run

    environment()
    floor, found = floors(arguments.blocks or 32), {}
    print("ms; in brackets, times the floor; then the first call's ms\n")
    print(f"| | {' | '.join(f'{case}: {ms:.1f}' for case, ms in floor.items())} |")
    print(f"|{'---|' * (1 + len(floor))}", flush=True)
    for family in arguments.families or FAMILIES:
        os.environ["KERAS_BACKEND"] = "jax" if family.startswith("jax") else "torch"
        options = "--family", family, "--blocks", str(arguments.blocks)
        out, _ = run(__file__, *options, errors=None).communicate()
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        if not lines:
            print(f"| {family} | died |", flush=True)
            continue
        result = found[family] = lines[0]
        cells = [
            f"{ms:.2f} ({ms / floor[case]:.2f}) {result['first'][case]:.0f}"
            for case, ms in result["found"].items()
        ]
        print(f"| {family} | {' | '.join(cells)} |", flush=True)
    for case, ms in floor.items():
        times = {family: result["found"][case] for family, result in found.items()}
        peer = {"floor": ms, **{f: t for f, t in times.items() if f == "hugging-face"}}
        times = {f: t for f, t in times.items() if f != "hugging-face"}
        name = f"xLSTM-7B, {arguments.blocks or 32} blocks"
        record.add(__file__, name, case, "ms", times, peer, backend="both")


if __name__ == "__main__":
    main()
