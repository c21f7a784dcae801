"""The sLSTM's Triton kernels on torch: a head in one program, in several, by lanes in a cluster or
in programs of 16 units. Without a GPU test_triton.py runs this file in a process that interprets."""

import pytest
from cases import make_flags
from contract.on_torch import OnTorch, on_gpu
from contract.slstm import sLSTM
from tools import BACKEND, GPU, INTERPRETED, some, tensor

if BACKEND != "torch" or not (GPU or INTERPRETED):
    pytest.skip("on torch, on a GPU or by the interpreter", allow_module_level=True)

import torch
from keras_xlstm.backends.kernels.slstm import plan
from keras_xlstm.backends.torch import device
from keras_xlstm.backends.torch import slstm as kernels


def cut_of(x):
    B, T, _, H, D = x.shape
    return plan.Cut(device.of(x.device, x.dtype), B, T, H, D, x.dtype.itemsize)


# Of kernels for larger heads, what a layout of programs could break: TestOneProgram runs all.
INTERPRETED_RUNS = (
    "outputs", "sizes", "holes-growing", "step_may_reset", "options[all]", "nan_reaches",
    "rows_of_a_batch[9]", "past_a_mask[holes]", "extreme", "small_devices", "little_shared",
    "any_length",
)  # fmt: skip


class Kernels(OnTorch, sLSTM):
    dtypes = ("float32", "bfloat16", "float16") if GPU else ("float32",)
    unfit = (
        ({"dtype": "float64"}, "dtypes are float32, bfloat16 and float16, not float64"),
        ({"D": 1025}, "up to 1024 units a head, not 1025"),
    )

    @pytest.mark.parametrize("rows", some([(1,), (9,)], [(1,), (8,), (9,), (33,)]))
    def test_rows_of_a_batch(self, rows, rng):
        self.check(self.case(rng, B=rows, T=2))


class WellFormed:
    def test_operators_are_well_formed(self, rng):
        case = self.case(rng, T=2)
        x, R, bias, *state = (x.requires_grad_() for x in case.tensors())
        flags = torch.zeros(x.shape[:2], dtype=torch.int8, device=x.device)
        for given in ((bias, *state, flags, flags, state[0].detach()), (None,) * 8):
            torch.library.opcheck(kernels._forward.call, (x, R, *given, False, 0.0, True))


class TestOneProgram(WellFormed, Kernels):
    sizes, cuts = {"T": 9}, (4,)
    heads = [{"D": D, "T": 40 if GPU else 2} for D in (1, 16, 17, 64)]  # noqa: RUF012


class TestSeveralPrograms(WellFormed, Kernels):
    every_run = None if GPU else INTERPRETED_RUNS
    sizes, cuts = {"D": 70, "T": 9 if GPU else 3, "H": 1}, (2,)
    lengths = (1, 2, 65) if GPU else (1, 2)
    heads = [{"D": D, "T": 40 if GPU else 2} for D in (65, 100)]  # noqa: RUF012
    if GPU:
        heads += [{"D": D, "T": 70} for D in (128, 192, 256, 300, 768, 1024)]

    @on_gpu
    @pytest.mark.parametrize(("B", "D"), [(200, 192), (500, 70), (2100, 64), (300, 128)])
    def test_more_rows_than_run_at_once(self, B, D, rng):
        """Several launches, each of programs that are all resident; larger tiles of rows."""
        self.check(self.case(rng, B=B, T=12, H=2, D=D), "bfloat16")

    @pytest.mark.parametrize("processors", [1, 7, 13])
    def test_small_devices(self, processors, rng, monkeypatch):
        """Too few processors for the programs of a head: a launch for every step."""
        if INTERPRETED and processors > 1:
            pytest.skip("the interpreter runs one program after the other")
        monkeypatch.setattr(device, "processors", lambda device: processors)
        monkeypatch.setattr(device, "all_shared_memory", device.shared_memory)
        # More units than one round has, and a rest.
        T, H, D = (6, 2, 200) if GPU else (2, 1, 136)
        case = self.case(rng, B=9, T=T, H=H, D=D)
        cut = cut_of(case.tensors()[0])
        assert cut.waits == (cut.tiles <= cut.resident)
        self.check(case, **make_flags("holes", "growing", 9, T, rng))

    def test_a_device_with_little_shared_memory_says_so(self, rng, monkeypatch):
        monkeypatch.setattr(device, "shared_memory", lambda device: 30_000)
        inputs = self.case(rng, B=1, T=2, D=300).tensors()
        with pytest.raises(ValueError, match="300 units are too large for the device's shared mem"):
            self.op(*inputs[:3])
        self.check(self.case(rng, B=1, T=2, D=40))  # in one program it needs little


class Lanes(Kernels):
    """In PTX, lane by lane, in 16 bits."""

    dtypes, unfit = ("bfloat16", "float16") if GPU else ("float16",), ()
    # By autocast and in float32 there are other kernels, which are above.
    test_fit = test_export_is_native = test_compiled_whole = None

    def check(self, case, dtype=None, **options):
        dtype = dtype or self.dtypes[0]
        assert getattr(cut_of(tensor(case.inputs["x"], dtype)), self.kind)
        super().check(case, dtype, **options)

    def leaves(self, case):
        return [x.requires_grad_() for x in case.tensors(self.dtypes[0])[: case.given]]

    def test_the_same_bits_again(self, dtype, rng):
        case = self.case(rng, B=9)
        inputs = [x.requires_grad_() for x in case.tensors(dtype)[:3]]
        found = []
        for _ in range(2):
            h = self.h(*inputs)
            found.append([h, *torch.autograd.grad((h.float() ** 2).sum(), inputs)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


class TestClusters(Lanes):
    """Heads of 32, 64, ... units: their programs are a cluster, on Hopper; interpreted, one."""

    kind, every_run = "clustered", None if GPU else INTERPRETED_RUNS
    sizes, cuts = {"D": 96 if GPU else 32, "T": 9 if GPU else 4}, (2,)
    lengths = (1, 2, 3, 17) if GPU else (1, 3)
    heads = [  # noqa: RUF012
        {"B": 9, "T": 70 if GPU else 4, "D": D}
        for D in ((32, 64, 96, 128, 160, 192, 224, 256) if GPU else (64,))
    ]

    @on_gpu
    def test_on_older_devices(self, dtype, rng, monkeypatch):
        """A program alone, for heads of 64 units."""
        monkeypatch.setattr(device, "clusters", lambda device: 1)
        for D in (32, 64):
            self.check(self.case(rng, B=9, T=70, D=D), dtype)

    @on_gpu
    @pytest.mark.parametrize("D", [64, 192, 256])
    def test_more_than_run_at_once(self, D, rng):
        self.check(self.case(rng, B=300, T=12, H=3, D=D), "bfloat16")


class TestWide(Lanes):
    """Heads too large for a cluster, by programs of 16 units; interpreted, a launch for every step."""

    kind, cuts, lengths = "wide", (2,), (1, 2)
    every_run = None if GPU else ("options[all]", "nan_reaches")
    sizes = {"D": 320 if GPU else 96, "T": 9 if GPU else 3, "H": 1}  # noqa: RUF012
    heads = [  # noqa: RUF012
        {"B": 9, "T": 70 if GPU else 3, "D": D, "H": 1}
        for D in ((288, 320, 512, 768, 992, 1024) if GPU else (96,))
    ]

    @on_gpu
    @pytest.mark.parametrize("clusters", [1, 8])
    @pytest.mark.parametrize(("B", "D"), [(1, 160), (3, 256), (200, 320)])
    def test_in_turn(self, B, D, clusters, rng, monkeypatch):
        """Several launches, of as many programs as are resident; on older devices smaller heads, too."""
        monkeypatch.setattr(device, "clusters", lambda device: clusters)
        monkeypatch.setattr(
            self, "kind", "wide" if clusters == 1 or D > 256 else "clustered", False
        )
        self.check(self.case(rng, B=B, T=12, H=2, D=D), "bfloat16")

    @on_gpu
    def test_on_a_small_device(self, rng, monkeypatch):
        """Too few processors for the programs of a head: a launch for every step."""
        monkeypatch.setattr(device, "processors", lambda device: 13)
        self.check(self.case(rng, B=9, T=6, H=2), "bfloat16")
