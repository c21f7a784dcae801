"""What the mLSTM computes, by whatever implementation."""

import pytest
from cases import mLSTMCase
from tools import GPU

from contract.base import Contract


class mLSTM(Contract):
    Case = mLSTMCase
    # Gradients are differences of larger terms: 7.2e-5 was seen of the native form, and 1.2e-4 of a
    # kernel in that case. A GPU's kernels multiply by 3 products of TF32, 2 bits short of float32:
    # 1.6e-4 was seen for 5.5e-5 of the native form.
    extreme_factor = 15.0 if GPU else 10.0
    cancelling = (*"qkif",) if GPU else ()  # of terms around 1e15
    options = {"chunk_size": 16}  # noqa: RUF012
    sizes = {"T": 37}  # noqa: RUF012  several chunks, and a rest
    lengths = (1, 15, 16, 17, 65)
    heads = ({"K": 20, "V": 40}, {"K": 64, "V": 16})
    variants = ({"input_gate": "sigmoid"}, {"eps": 0.0}, {"eps": 0.1})

    @pytest.mark.skipif(not GPU, reason="needs a GPU")
    @pytest.mark.parametrize("chunk_size", [16, 32, 64, 128, 256, 512])
    def test_chunk_sizes(self, chunk_size, rng):
        case = self.case(rng, B=1, T=700, H=1, K=64, V=64)
        self.check(case, "bfloat16", chunk_size=chunk_size)

    def test_options(self, changed, rng):
        self.check(self.case(rng), **changed)
