"""The launches of a block's kernels for inference as plans (kernels/plan.py). All are given the
device, which the products alone depend on.
"""

from keras_xlstm.backends.kernels.mlstm.tiles import power
from keras_xlstm.backends.kernels.plan import Buffer, Plan, present, step, without_pipeline

_TILE = 32768  # numbers of the largest thread block
_COLUMNS = 64  # of a product, of a thread block
ROWS = 64  # steps up to which a product is one of few
GATE_ROWS = 256  # likewise, for both gates together
WIDEST = 16384  # numbers that a thread block normalises


def _plan(kernel, grid, inputs, outputs, numbers, constants):
    """`inputs` and `outputs`: {parameter without its _p: Buffer or None}."""
    from keras_xlstm.backends.kernels.block import inference

    reads, writes = (
        {f"{name}_p": buffer for name, buffer in buffers.items()} for buffers in (inputs, outputs)
    )
    only = step(getattr(inference, kernel), grid, reads | numbers, writes, constants)
    return Plan(present(*inputs.values()), tuple(outputs.values()), (), (), (only,))


def rms_norm(device, shape, dtype, eps):
    """x, scale -> y, all (..., D) but the scale (D,)."""
    x, D = Buffer("x", shape, dtype), shape[-1]
    inputs = {"x": x, "scale": Buffer("scale", (D,), dtype)}
    constants = {"D": D, "P": power(D), "num_warps": 1 if D <= 512 else 8}
    return _plan(
        "rms_norm", x.count // D, inputs, {"y": x._replace(name="y")}, {"eps": eps}, constants
    )


def head_norm(device, shape, H, dtype, gamma_dtype, gated, eps):
    """x, gamma, perhaps a gate -> y, all (..., H * D) but gamma."""
    D = shape[-1] // H
    x = Buffer("x", shape, dtype)
    inputs = {"x": x, "gamma": Buffer("gamma", shape[-1:], gamma_dtype)}
    inputs["gate"] = x._replace(name="gate") if gated else None
    constants = {"H": H, "D": D, "P": power(D), "num_warps": 1 if D <= 512 else 4}
    return _plan(
        "head_norm", x.count // D, inputs, {"y": x._replace(name="y")}, {"eps": eps}, constants
    )


def gated_unit(device, shape, dtype, gelu):
    """x (..., 2 * F) -> activation(x[..., :F]) * x[..., F:]."""
    F, x = shape[-1] // 2, Buffer("x", shape, dtype)
    y = Buffer("y", (*shape[:-1], F), dtype)
    BF = min(power(F), 1024)
    constants = {"F": F, "BF": BF, "GELU": gelu, "num_warps": 4}
    return _plan("gated_unit", y.count // F * -(-F // BF), {"x": x}, {"y": y}, {}, constants)


def gate_pair(device, shape, H, dtype, cap):
    """x (..., D), both gates' kernels and biases -> both gates (..., H) in float32; `cap` or None
    bounds them."""
    D, x = shape[-1], Buffer("x", shape, dtype)
    inputs = {"x": x}
    inputs |= {f"{gate}_kernel": Buffer(f"{gate}_kernel", (D, H)) for gate in "if"}
    inputs |= {f"{gate}_bias": Buffer(f"{gate}_bias", (H,)) for gate in "if"}
    outputs = {gate: Buffer(gate, (*shape[:-1], H)) for gate in "if"}
    BD = max(16, min(power(D), _TILE // power(H)))
    constants = {
        "D": D, "BD": BD, "H": H, "PH": power(H), "CAP": cap is not None, "num_warps": 16,
        "num_stages": 1,
    }  # fmt: skip
    numbers = {"cap": float(cap or 1.0)}
    return _plan("gate_pair", 2 * (x.count // D), inputs, outputs, numbers, constants)


def _product(device, N, K, widths, dtype, parts):
    """Constants of `products`: a thread block has 64 columns, of all rows of the kernel or of a
    part of them."""
    widths = [*widths, 0, 0, 0][:4]
    BK = 64 if parts > 1 or N > 16 else 128
    KS = -(-K // (parts * BK)) * BK
    constants = {
        "N": N, "K": K, **{f"M{n}": M for n, M in enumerate(widths)}, "PARTS": parts, "KS": KS,
        "BN": max(16, power(N)), "BM": _COLUMNS, "BK": BK, "ST": 4, "num_stages": 4, "num_warps": 4,
        "PRECISION": "ieee" if dtype == "float32" else "tf32",
    }  # fmt: skip
    return constants if device.pipelined else without_pipeline(constants)


def unsupported_product(K, widths):
    """Whether `products` cannot multiply (N, K) by kernels of these widths."""
    return len(widths) > 4 or K % 64 or any(M % _COLUMNS for M in widths)


def products(device, shape, widths, dtype):
    """x (..., K) and kernels (K, width) -> their products (..., width)."""
    from keras_xlstm.backends.kernels.block import inference

    x, K = Buffer("x", shape, dtype), shape[-1]
    kernels = [Buffer(f"w{n}", (K, M), dtype) for n, M in enumerate(widths)]
    outputs = [Buffer(f"y{n}", (*shape[:-1], M), dtype) for n, M in enumerate(widths)]
    constants = _product(device, x.count // K, K, widths, dtype, 1)
    names = [f"{kind}{n}_p" for kind in "wy" for n in range(4)]
    given = {"x_p": x} | {f"{b.name}_p": b for b in (*kernels, *outputs)}
    reads = {"x_p": x} | {name: given.get(name) for name in names if name[0] == "w"}
    writes = {name: given.get(name) for name in names if name[0] == "y"}
    grid = sum(widths) // _COLUMNS
    only = step(inference.products, grid, reads, writes, constants)
    return Plan((x, *kernels), tuple(outputs), (), (), (only,))


def added_product(device, shape, K, dtype):
    """x (..., M), h (..., K) and a kernel (K, M) -> x + h @ kernel. Thread blocks have a part of
    the kernel's rows each: of its columns there are too few for a GPU."""
    from keras_xlstm.backends.kernels.block import inference

    M, x = shape[-1], Buffer("x", shape, dtype)
    h, kernel = Buffer("h", (*shape[:-1], K), dtype), Buffer("kernel", (K, M), dtype)
    parts, N = 4, x.count // M
    partial, y = Buffer("partial", (parts, N, M)), Buffer("y", shape, dtype)
    constants = _product(device, N, K, [M], dtype, parts)
    reads = {"x_p": h, "w0_p": kernel} | dict.fromkeys(f"w{n}_p" for n in (1, 2, 3))
    writes = {"y0_p": partial} | dict.fromkeys(f"y{n}_p" for n in (1, 2, 3))
    product = step(inference.products, M // _COLUMNS * parts, reads, writes, constants)
    constants = {"PARTS": parts, "COUNT": x.count, "BLOCK": 512, "num_warps": 4}
    reads = {"parts_p": partial, "x_p": x}
    add = step(inference.add_parts, -(-x.count // 512), reads, {"y_p": y}, constants)
    return Plan((x, h, kernel), (y,), (), (partial,), (product, add))
