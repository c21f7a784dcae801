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


def _product(device, N, K, widths, dtype, parts, in_bytes):
    """Constants of `products`: a thread block has 64 columns, of all rows of the kernel or of a
    part of them."""
    BK = 128 if in_bytes or (parts == 1 and N <= 16) else 64
    KS = -(-K // (parts * BK)) * BK
    widths = [*widths, 0, 0, 0][:4]
    constants = {
        "K": K, **{f"M{n}": M for n, M in enumerate(widths)}, "PARTS": parts, "KS": KS,
        "BM": _COLUMNS, "BK": BK, "ST": 4, "num_stages": 4, "num_warps": 4,
    }  # fmt: skip
    if in_bytes:
        constants["P"] = power(K)
    else:
        precision = "ieee" if dtype == "float32" else "tf32"
        constants |= {"N": N, "BN": max(16, power(N)), "PRECISION": precision}
    return constants if device.pipelined else without_pipeline(constants)


def unsupported_product(K, widths, in_bytes):
    """Whether `products` cannot multiply (N, K) by kernels of these widths."""
    too_long = in_bytes and K > WIDEST
    return too_long or len(widths) > 4 or K % 64 or any(M % _COLUMNS for M in widths)


def _four(kind, buffers):
    """{parameter: buffer or None} of up to four."""
    return {f"{kind}{n}_p": buffer for n, buffer in enumerate([*buffers, None, None, None][:4])}


def _multiplied(device, x, K, kernels, scales, eps, outputs, parts=1):
    """The step of x times kernels (K, M), which are bytes if there are scales, to outputs."""
    from keras_xlstm.backends.kernels.block import inference

    widths = [kernel.shape[1] for kernel in kernels]
    constants = _product(device, x.count // K, K, widths, x.dtype, parts, bool(scales))
    kernel, reads = inference.products, {"x_p": x} | _four("w", kernels)
    if scales:
        kernel, reads = inference.byte_products, reads | _four("s", scales) | {"eps": eps}
    grid = sum(widths) // _COLUMNS * parts
    return step(kernel, grid, reads, _four("y", outputs), constants)


def _weights(K, widths, dtype, scale_dtype):
    """Kernels (K, M) of some widths M: in bytes, with scales, where those have a dtype."""
    dtype, each = "int8" if scale_dtype else dtype, list(enumerate(widths))
    kernels = [Buffer(f"w{n}", (K, M), dtype) for n, M in each]
    return kernels, [Buffer(f"s{n}", (M,), scale_dtype) for n, M in each if scale_dtype]


def products(device, shape, widths, dtype, scale_dtype=None, eps=None):
    """x (..., K) and kernels (K, width), with their scales if they are bytes -> their products
    (..., width)."""
    x, K = Buffer("x", shape, dtype), shape[-1]
    kernels, scales = _weights(K, widths, dtype, scale_dtype)
    outputs = [Buffer(f"y{n}", (*shape[:-1], M), dtype) for n, M in enumerate(widths)]
    only = _multiplied(device, x, K, kernels, scales, eps, outputs)
    return Plan((x, *kernels, *scales), tuple(outputs), (), (), (only,))


def added_product(device, shape, K, dtype, scale_dtype=None, eps=None):
    """x (..., M), h (..., K) and a kernel (K, M), with its scales if it is bytes -> x + h @ kernel.
    Thread blocks have a part of its rows each: of its columns there are too few for a GPU."""
    from keras_xlstm.backends.kernels.block import inference

    M, x = shape[-1], Buffer("x", shape, dtype)
    h = Buffer("h", (*shape[:-1], K), dtype)
    kernels, scales = _weights(K, [M], dtype, scale_dtype)
    parts, N = 4, x.count // M
    partial, y = Buffer("partial", (parts, N, M)), Buffer("y", shape, dtype)
    product = _multiplied(device, h, K, kernels, scales, eps, [partial], parts)
    constants = {"PARTS": parts, "COUNT": x.count, "BLOCK": 512, "num_warps": 4}
    reads = {"parts_p": partial, "x_p": x}
    add = step(inference.add_parts, -(-x.count // 512), reads, {"y_p": y}, constants)
    return Plan((x, h, *kernels, *scales), (y,), (), (partial,), (product, add))
