"""What the sLSTM computes, by whatever implementation."""

import numpy as np
from cases import make_flags, sLSTMCase
from tools import array

from contract.base import Contract


class sLSTM(Contract):
    Case = sLSTMCase
    extreme_factor = 50.0  # m itself is a float32 near 1e4: its last digit is worth 1e-3
    lengths = (1, 2, 3, 65)
    heads = ({"D": 1}, {"D": 16}, {"D": 17})
    variants = ("forget_gate", "recurrent_gradient_clip", "recurrent_scale", "all")

    def test_options(self, changed, rng):
        """Each alone, and all at once; a scale with a mask, whose steps it does not reach."""
        case = self.case(rng)
        options = {
            "forget_gate": "exp", "recurrent_gradient_clip": 0.05,
            "recurrent_scale": rng.integers(0, 2, case.inputs["h"].shape) * 2.0,
        }  # fmt: skip
        flags = make_flags("holes", "returning" if changed == "all" else None, *case.extent, rng)
        if changed != "all":
            options = {changed: options[changed]}
        self.check(case, **options, **(flags if changed in ("all", "recurrent_scale") else {}))

    def test_every_step_of_a_row_that_starts_fresh(self, rng):
        case = self.case(rng).fresh(0)
        case.gates()[0][:] -= 800.0
        case.cotangents[3][:] = 0.0  # n itself is not the same number at another m
        self.check(case, self.dtypes[0], factor=self.extreme_factor)

    def test_nan_reaches_the_output(self, rng):
        """And ends: what programs wait for is not to be confused with a NaN of the user's."""
        case, dtype = self.case(rng), self.dtypes[0]
        case.inputs["x"][1, 2] = np.nan
        for bits in (0xFFFFFFFF, 0x7FC00000, 0xFFFF0000):
            case.inputs["h"] = case.inputs["h"].astype("float32")
            case.inputs["h"][2] = np.array([bits], "uint32").view("float32")[0]
            h = array(self.op(*case.tensors(dtype))[0]).astype("float32")
            lost = np.isnan(h).any((2, 3))
            np.testing.assert_array_equal(lost[0], False)
            np.testing.assert_array_equal(lost[1], np.arange(lost.shape[1]) >= 2)
            np.testing.assert_array_equal(lost[2], True)
