"""Training xLSTM-Large (407M parameters) on several NVIDIA GPUs of one machine, beside one of them:
`model.fit` on JAX under `keras.distribution.DataParallel`, in bfloat16.

    python benchmarks/gpu_devices.py [--devices 2] [--context 131072] [--tiny]

8 sequences of 2048 tokens a step for each GPU. With `--context`, one sequence of so many tokens a
step, whose time the GPUs share out (`ContextParallel`); blocks are computed again in the backward
pass. Efficiency: the tokens per second over those of one GPU times their number. Each count runs in
a process of its own; the time is that of whole epochs of 20 steps, the best of three, after one
that compiles. `--tiny` runs a small model on what devices there are, or on parts of the CPU, to see
that it works.
"""

import argparse
import json
import os
import sys

import gpu_jax
import gpu_model
import gpu_torch
import record

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--devices", type=int, default=2, help="how many, beside one (default 2)")
parser.add_argument("--context", type=int, help="tokens of one sequence over all devices")
parser.add_argument("--tiny", action="store_true", help="a small model, for a dry run")
record.option(parser)
parser.add_argument("--only", type=int, help=argparse.SUPPRESS)


def measure(devices, tiny, context):
    if tiny:
        gpu_model.T, gpu_model.STEPS, gpu_model.VOCABULARY = 64, 2, 256
        gpu_model.UNITS, gpu_model.BLOCKS = 64, 2
    if context:
        gpu_model.B, gpu_model.T = 1, context
    print(json.dumps(gpu_jax.model_speed(devices, bool(context))), flush=True)


def main(devices, tiny, context):
    if tiny:
        flags = os.environ.get("XLA_FLAGS", "")  # of JAX; this one is about the CPU alone
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    else:
        from importlib.metadata import version

        print(f"jax {version('jax')}; ", end="")
        gpu_torch.environment()
    print("\n| devices | tokens/s | efficiency | peak GiB | first epoch s |")
    print("|---|---|---|---|---|")
    one, found = None, {}
    for count in (1, devices):
        arguments = ["--only", str(count), *["--tiny"] * tiny]
        arguments += ["--context", str(context)] if context else []
        out, _ = gpu_torch.run(__file__, *arguments, errors=None).communicate()
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
        if not lines:
            print(f"| {count} | died | | | |", flush=True)
            continue
        tokens, peak, first = lines[0]
        one = one or tokens / count
        found[count] = tokens, peak, 100 * tokens / count / one
        cells = f"{tokens:,.0f} | {tokens / count / one:.1%} | {peak:.1f} | {first:.0f}"
        print(f"| {count} | {cells} |", flush=True)
    case = "a small model" if tiny else f"{gpu_model.CASE} for each GPU"
    parts = [("training", "tokens/s"), ("peak memory", "GiB"), ("efficiency", "%")]
    for n, (metric, unit) in enumerate(parts):
        ours = {str(count): figures[n] for count, figures in found.items()}
        record.add(__file__, case, metric, unit, ours, backend="jax")


if __name__ == "__main__":
    arguments = parser.parse_args()
    if arguments.only:
        measure(arguments.only, arguments.tiny, arguments.context)
        sys.exit()
    main(arguments.devices, arguments.tiny, arguments.context)
