"""The oracle's gradients against finite differences of its own outputs."""

import numpy as np
import oracle
import pytest
from cases import make_mask, make_segments, mLSTMCase, sLSTMCase
from tools import BACKEND

pytestmark = pytest.mark.skipif(BACKEND != "torch", reason="NumPy alone: run with torch")


def check(call, case, state_names, reference):
    """The loss reads states in true scale (times exp(m)): the m that gradients take as constant."""

    def loss(inputs):
        h, state = call(inputs)
        *values, m = state
        loss = np.sum(h * case.cotangents[0])
        for name, value, ct in zip(state_names, values, case.cotangents[1:], strict=True):
            scale = np.exp(m - reference) if name != "h" else np.ones_like(m)
            loss += np.sum(value * scale[(..., *[None] * (value.ndim - m.ndim))] * ct)
        return loss

    return loss


@pytest.mark.parametrize("which", ["mlstm", "slstm"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients(which, packed, rng):
    B, T = 2, 6
    case = mLSTMCase(rng, B=B, T=T, K=3, V=2) if which == "mlstm" else sLSTMCase(rng, B=B, T=T, D=2)
    mask = make_mask("holes", B, T, rng) if packed else None
    ids = make_segments("growing", B, T, rng) if packed else None
    count = 5 if which == "mlstm" else 3

    def call(inputs, **options):
        values = [inputs[n] for n in case.names]
        function = getattr(oracle, which)
        return function(*values[:count], values[count:], mask, ids, **options)

    _, state, gradients = call(case.inputs, gradients=case.cotangents)
    loss = check(call, case, "Cn" if which == "mlstm" else "hcn", state[-1])
    for name in case.names:
        x = case.inputs[name]
        for index in rng.permutation(x.size)[:6]:
            index = np.unravel_index(index, x.shape)
            plus, minus = ({**case.inputs, name: x.copy()} for _ in range(2))
            plus[name][index] += 1e-6
            minus[name][index] -= 1e-6
            slope = (loss(plus) - loss(minus)) / 2e-6
            assert abs(slope - gradients[name][index]) <= 1e-5 * max(1, abs(slope)), (name, index)
