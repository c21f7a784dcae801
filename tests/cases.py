"""Random inputs of both ops, held against the float64 oracle; the masks and documents they run with."""

import keras
import numpy as np
import oracle
from keras import ops
from tools import TOLERANCE, array, assert_close, tensor, vjp

import keras_xlstm

MASKS = ("left", "right", "holes", "rows")


def make_mask(kind, B, T, rng):
    if kind is None:
        return None
    t = np.arange(T)[None]
    lengths = rng.integers(1, T + 1, (B, 1))
    mask = {
        "left": t >= T - lengths,
        "right": t < lengths,
        "holes": rng.random((B, T)) < 0.6,
        "rows": np.broadcast_to(np.arange(B)[:, None] % 2 == 0, (B, T)),
    }[kind]
    return np.array(mask)


def make_segments(kind, B, T, rng):
    if kind is None:
        return None
    ids = np.cumsum(rng.random((B, T)) < min(0.5, 4 / T), axis=1)
    return ids % 2 if kind == "returning" else ids  # an id that comes back is a new segment


def make_flags(mask, segments, B, T, rng):
    """Arguments of a run: a mask and segments of these kinds."""
    return {"mask": make_mask(mask, B, T, rng), "segment_ids": make_segments(segments, B, T, rng)}


def flags(mask, segment_ids):
    """Those that are there, by name: arguments of a compiled function, not constants in it."""
    given = {"mask": mask, "segment_ids": segment_ids}
    given = {name: tensor(a, a.dtype.name) for name, a in given.items() if a is not None}
    return given.keys(), given.values()


class Case:
    """Inputs of one op by name, and a cotangent for each of its outputs but the last state, m.

    The first `timed` inputs run over time, the first `given` are no states. The op takes the
    options `known`, by the oracle's names.
    """

    def tensors(self, dtype="float32"):
        """All inputs. States are never of half precision."""
        return [
            tensor(self.inputs[name], dtype if n < self.given else self.state_dtype(dtype))
            for n, name in enumerate(self.names)
        ]

    @staticmethod
    def state_dtype(dtype):
        return "float64" if dtype == "float64" else "float32"

    def call(self, *inputs, **options):
        """h and the states, flat; of inputs without states too."""
        states = inputs[self.given :] or None
        op = getattr(keras_xlstm.ops, self.op)
        h, state = op(*inputs[: self.given], states, return_state=True, **options)
        return h, *state

    def expected(self, inputs, mask=None, segment_ids=None, **options):
        """h, states and gradients by the oracle, of inputs as tensors."""
        rounded = [np.asarray(array(ops.cast(x, "float64")), np.float64) for x in inputs]
        options = {self.known[k]: v for k, v in options.items() if k in self.known}
        return getattr(oracle, self.op)(
            *rounded[: self.given], rounded[self.given :], mask, segment_ids,
            gradients=self.cotangents, **options,
        )  # fmt: skip

    def run(self, dtype, mask=None, segment_ids=None, compiled=True, xla=True, **options):
        """(outputs, gradients), and the oracle's (h, states, gradients)."""
        inputs = self.tensors(dtype)
        names, given = flags(mask, segment_ids)

        def call(*arguments):
            inputs, given = arguments[: len(self.names)], arguments[len(self.names) :]
            return self.call(*inputs, **dict(zip(names, given, strict=True)), **options)

        cotangents = [tensor(c, self.state_dtype(dtype)) for c in self.cotangents] + [None]
        got = vjp(call, inputs, cotangents, compiled, xla, given)
        return got, self.expected(inputs, mask, segment_ids, **options)

    def check(self, dtype="float32", factor=1.0, least=0.0, **options):
        ((h, *states), gradients), (want_h, want_states, wanted) = self.run(dtype, **options)
        tolerance = TOLERANCE[dtype] * factor
        assert keras.backend.standardize_dtype(h.dtype) == dtype
        assert_close(ops.cast(h, "float64"), want_h, tolerance, "h")
        # m may differ in its last digit, where that is worth more than others': compare in one scale.
        m = array(states[-1])
        scale = np.exp(m - want_states[-1])
        for name, a, b in zip(self.names[self.given :], states, want_states, strict=True):
            if name in self.scaled:
                a = array(a) * scale[(..., *[None] * (b.ndim - m.ndim))]
            assert_close(a, b, tolerance, f"last {name}", least if name == "m" else 0.0)
        for name, a in zip(self.names, gradients, strict=True):
            assert_close(
                ops.cast(a, "float64"), wanted[name], tolerance, f"gradient of {name}", least
            )

    @property
    def extent(self):
        """How many rows and steps."""
        return self.cotangents[0].shape[:2]

    def steps(self, inputs, start, stop):
        """The same inputs, of these steps alone."""
        return [x[:, start:stop] if n < self.timed else x for n, x in enumerate(inputs)]

    @property
    def of_rows(self):
        """The inputs that have a batch."""
        return (*self.names[: self.timed], *self.names[self.given :])

    def fresh(self, rows=slice(None)):
        """These rows start from an empty state."""
        for name in self.names[self.given :]:
            self.inputs[name][rows] = 0.0
        return self

    def extreme(self, rng):
        """Gates of +-1e4 in any mixture, and no cotangents of states."""
        self.cotangents[1:] = [np.zeros_like(x) for x in self.cotangents[1:]]
        for gate in self.gates():
            gate += 1e4 * (rng.integers(0, 3, gate.shape) - 1)
        return self


class mLSTMCase(Case):
    op, names, timed, given, scaled = "mlstm", (*"qkvif", *"Cnm"), 5, 5, "Cn"
    required, layer, operator = 5, "mLSTM", "mlstm_forward"
    known = {"input_gate": "input_gate", "eps": "eps"}  # noqa: RUF012

    def __init__(self, rng, B=3, T=20, H=2, K=5, V=7, state=True, gate_scale=1.0):
        self.inputs = {n: rng.normal(size=(B, T, H, d)) for n, d in zip("qkv", (K, K, V))}
        self.inputs |= {n: gate_scale * rng.normal(size=(B, T, H)) for n in "if"}
        self.inputs["f"] += 2.0
        shapes = {"C": (B, H, K, V), "n": (B, H, K), "m": (B, H)}
        scale = 1.0 if state else 0.0
        self.inputs |= {n: scale * rng.normal(size=s) for n, s in shapes.items()}
        self.cotangents = [rng.normal(size=s) for s in ((B, T, H, V), shapes["C"], shapes["n"])]

    def gates(self):
        """The input gate's inputs, the forget gate's: views."""
        return self.inputs["i"], self.inputs["f"]

    def at_the_edge(self, rng):
        """The largest numbers of float16, of which h is a mean that it can hold."""
        largest = 65504.0
        for name in "qk":  # of one sign: then h is a mean of v
            self.inputs[name] = largest * rng.choice([1.0, 0.5, 1e-8], self.inputs[name].shape)
        self.inputs["v"] = largest * rng.choice([1.0, -1.0, 1e-8, 0.0], self.inputs["v"].shape)
        for name in "Cn":
            self.inputs[name] = np.abs(self.inputs[name])
        for gate in self.gates():
            gate[...] = edges(rng, gate.shape)
        return self


class sLSTMCase(Case):
    op, names, timed, given, scaled = "slstm", ("x", "R", "bias", *"hcnm"), 1, 3, "cn"
    required, layer, operator = 2, "sLSTM", "slstm_triton_forward"
    known = {  # noqa: RUF012
        "forget_gate": "forget_gate", "recurrent_gradient_clip": "clip", "recurrent_scale": "scale",
    }  # fmt: skip

    def __init__(self, rng, B=3, T=20, H=2, D=6, state=True, gate_scale=1.0):
        self.inputs = {
            "x": rng.normal(size=(B, T, 4, H, D)),
            "R": rng.normal(size=(H, D, 4, D)) / np.sqrt(D),
            "bias": rng.normal(size=(4, H, D)),
        }
        self.inputs["x"][:, :, :2] *= gate_scale
        scale = 1.0 if state else 0.0
        self.inputs |= {n: scale * rng.normal(size=(B, H, D)) for n in "hcm"}
        self.inputs["n"] = scale * (rng.random((B, H, D)) + 0.5)
        self.cotangents = [rng.normal(size=(B, T, H, D))]
        self.cotangents += [rng.normal(size=(B, H, D)) for _ in "hcn"]

    def gates(self):
        return self.inputs["x"][:, :, 0], self.inputs["x"][:, :, 1]

    def at_the_edge(self, rng):
        self.inputs["x"][...] = edges(rng, self.inputs["x"].shape)
        return self


def edges(rng, shape):
    return rng.choice([1e4, -1e4, 65504.0, -65504.0, 1.0, -1.0], shape)


CASES = {"mlstm": mLSTMCase, "slstm": sLSTMCase}
