"""Launches of compiled Triton kernels by the CUDA driver: what it is given (on a GPU every test of the
kernels goes this way; that all kernels' parameters are as expected, test_triton.py sees)."""

import ctypes
import struct
import types

import pytest
from tools import BACKEND

if BACKEND != "torch":
    pytest.skip("runs on torch", allow_module_level=True)

import torch
from keras_xlstm.backends.torch import driver

PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .align 64 .b8 kernel_param_1[128],
	.param .u32 kernel_param_2,
	.param .u32 kernel_param_3,
	.param .u64 kernel_param_4,
	.param .u64 kernel_param_5,
	.param .f32 kernel_param_6,
	.param .u32 kernel_param_7,
	.param .u64 .ptr .global .align 1 kernel_param_8,
	.param .u64 .ptr .global .align 1 kernel_param_9,
	.param .u64 .ptr .global .align 1 kernel_param_10
)
.reqntid 128
{
"""
SIGNATURE = {
    "a": "*bf16", "none": "constexpr", "d": "tensordesc<bf16[8, 16],layout>", "scale": "fp32",
    "T": "i32", "b": "*fp32", "K": "constexpr",
}  # fmt: skip


def compiled(ptx=PTX, signature=SIGNATURE, **more):
    metadata = {
        "name": "kernel", "num_warps": 4, "shared": 1000, "num_ctas": 1,
        "tensordesc_meta": [{"swizzle": 3, "block_size": [8, 16]}],
    }  # fmt: skip
    return types.SimpleNamespace(
        asm={"ptx": ptx}, function=77, src=types.SimpleNamespace(signature=signature),
        metadata=types.SimpleNamespace(**metadata | more),
    )  # fmt: skip


class Driver:
    """Stands in for CUDA's; keeps what it was given."""

    def __init__(self, errors=()):
        self.errors, self.launched, self.encoded = list(errors), [], 0

    def cuLaunchKernelEx(self, config, function, places, extra):
        config = ctypes.cast(config, ctypes.POINTER(driver._Config)).contents
        attributes = config.attributes[: config.count]
        self.attributes = [(a.kind, a.value[:4]) for a in attributes]
        if self.errors:
            return self.errors.pop(0)
        read = [ctypes.string_at(p, n) for p, n in zip(places, (8, 128, 4, 4, 8, 8, 4, 4, 8, 8, 8))]
        assert places[1] % 64 == 0
        assert extra is None
        self.launched.append((function, list(config.sizes), config.stream, read))
        return 0

    def cuTensorMapEncodeTiled(self, place, dtype, rank, base, sizes, strides, box, *rest):
        assert place % 64 == 0
        assert (dtype, rank, base, *sizes, *strides, *box) == (9, 2, 4096, 32, 24, 64, 16, 8)
        assert rest[1:] == (0, 3, 2, 0)
        ctypes.memset(place, 7, 128)
        self.encoded += 1
        return 0

    def cuGetErrorString(self, error, text):
        return 1


@pytest.mark.parametrize(
    ("way", "attributes"),
    [
        ("alone", []), ("cooperative", [(2, [1, 0, 0, 0])]), ("clusters", [(4, [5, 1, 1, 0])]),
    ],
)  # fmt: skip
def test_what_the_driver_is_given(way, attributes, monkeypatch):
    fake = Driver()
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    cluster = 5 if way == "clusters" else 1
    given = compiled(launch_cooperative_grid=way == "cooperative")
    launch = driver.launcher(given, 5, cluster)
    a, b = torch.zeros(4), torch.zeros(4)
    base = types.SimpleNamespace(data_ptr=lambda: 4096)
    d = types.SimpleNamespace(base=base, shape=(24, 32), strides=(32, 1))
    for one, other in ((a, b), (a.data_ptr(), b.data_ptr())):
        launch(99, (one, None, d, 0.5, -3, other))
    assert fake.encoded == 1
    for function, sizes, stream, read in fake.launched:
        assert (function, sizes, stream) == (77, [5, 1, 1, 128, 1, 1, 1000], 99)
        numbers = b"".join([read[0], *read[2:]])
        want = struct.pack("<QiiqqfiQQQ", a.data_ptr(), 24, 32, 32, 1, 0.5, -3, b.data_ptr(), 0, 0)
        assert numbers == want
        assert read[1] == bytes([7] * 128)
    assert fake.attributes == attributes
    # As CUDA's headers lay them out.
    assert (ctypes.sizeof(driver._Attribute), ctypes.sizeof(driver._Config)) == (72, 56)


def test_a_thread_without_a_context_and_other_errors(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    fake = Driver(errors=[201, 0, 700])  # 0: it was launched
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    signature = {"a": "*fp32"}
    few = PTX.splitlines()
    ptx = "\n".join([*few[:3], *few[-5:]])  # one parameter, and Triton's own
    launch = driver.launcher(compiled(ptx, signature, tensordesc_meta=None), 1)
    launch(0, (4096,))
    assert made == [0]
    with pytest.raises(RuntimeError, match="could not be launched: CUDA's error 700"):
        launch(0, (4096,))


@pytest.mark.parametrize(
    "changed",
    [
        {"signature": SIGNATURE | {"T": "i64"}},  # not the sizes that the program has
        {"signature": SIGNATURE | {"T": "u1"}},
        {"signature": SIGNATURE | {"T": ("i32", "i32")}},
        {"ptx": PTX.replace("\t.param .u32 kernel_param_7,\n", "")},
        {"num_ctas": 2}, {"global_scratch_size": 8}, {"launch_pdl": True},
    ],
)  # fmt: skip
def test_what_is_unknown_is_left_to_triton(changed):
    assert driver.launcher(compiled(**changed), 1) is None
