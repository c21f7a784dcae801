"""The sLSTM's Triton kernels in PTX, lane by lane, in 16 bits: clusters, and programs of 16 units.
Without a GPU test_triton.py runs this file, too, in a process that interprets them."""

import numpy as np
import pytest
from test_ops import MASKS, make_mask, make_segments, sLSTMCase
from test_triton import GPU, INTERPRETED, assert_same_in_a_cuda_graph, no_plans, on_gpu  # noqa: F401
from tools import tensor

if not (GPU or INTERPRETED):
    pytest.skip("needs a GPU, or the interpreter", allow_module_level=True)

import torch
from keras_xlstm.backends.torch import device
from test_triton_slstm import check, cut_of

import keras_xlstm

# Heads of 32, 64, ... units in 16 bits: their programs are a cluster, on Hopper; interpreted, one.

HALVES = ["bfloat16", "float16"] if GPU else ["float16"]
halves = pytest.mark.parametrize("dtype", HALVES)


def check_clustered(case, dtype, kind="clustered", **options):
    assert getattr(cut_of(tensor(case.inputs["x"], dtype)), kind)
    check(case, dtype, **options)


def check_wide(case, dtype, **options):
    check_clustered(case, dtype, "wide", **options)


@halves
@pytest.mark.parametrize("D", [32, 64, 96, 128, 160, 192, 224, 256] if GPU else [32, 64])
def test_clusters(D, dtype, rng):
    B, T = (9, 70) if GPU else (9, 4)
    check_clustered(sLSTMCase(rng, B=B, T=T, D=D), dtype)
    check_clustered(sLSTMCase(rng, B=B, T=T, D=D, state=False), dtype)


@halves
@pytest.mark.parametrize("T", [1, 2, 3, 17])
def test_clusters_any_length(T, dtype, rng):
    check_clustered(sLSTMCase(rng, B=2, T=T, H=1, D=32), dtype)


@halves
@pytest.mark.parametrize("B", [1, 8, 17])
@pytest.mark.parametrize("D", [64, 192] if GPU else [32])
def test_clusters_rows_of_a_batch(B, D, dtype, rng):
    check_clustered(sLSTMCase(rng, B=B, T=3, D=D), dtype)


@on_gpu
@halves
def test_clusters_on_older_devices(dtype, rng, monkeypatch):
    """A program alone, for heads of 64 units."""
    monkeypatch.setattr(device, "clusters", lambda device: 1)
    for D in (32, 64):
        check_clustered(sLSTMCase(rng, B=9, T=70, D=D), dtype)


@on_gpu
@pytest.mark.parametrize("D", [64, 192, 256])
def test_more_clusters_than_run_at_once(D, rng):
    check_clustered(sLSTMCase(rng, B=300, T=12, H=3, D=D), "bfloat16")


@halves
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("segments", [None, "growing", "returning"])
def test_clusters_masks_and_segments(mask, segments, dtype, rng):
    B, T, D = (4, 9, 96) if GPU else (3, 4, 32)
    mask, ids = make_mask(mask, B, T, rng), make_segments(segments, B, T, rng)
    check_clustered(sLSTMCase(rng, B=B, T=T, D=D), dtype, mask=mask, segment_ids=ids)


@halves
@pytest.mark.parametrize("kind", ["clustered", "wide"])
def test_lanes_with_all_options(kind, dtype, rng):
    D = {"clustered": 128 if GPU else 32, "wide": 768 if GPU else 96}[kind]
    B, T, H = (11, 9, 1) if GPU else (3, 4, 1)
    mask, ids = make_mask("holes", B, T, rng), make_segments("returning", B, T, rng)
    case = sLSTMCase(rng, B=B, T=T, H=H, D=D)
    check_clustered(case, dtype, kind, forget_gate="exp")
    check_clustered(case, dtype, kind, recurrent_gradient_clip=0.2)
    scale = rng.integers(0, 2, case.inputs["h"].shape) * 2.0
    check_clustered(
        case, dtype, kind, mask=mask, segment_ids=ids, recurrent_scale=scale, forget_gate="exp",
        recurrent_gradient_clip=0.2,
    )  # fmt: skip


@halves
@pytest.mark.parametrize("seed", range(3))
def test_clusters_extreme_gates(seed, dtype):
    rng = np.random.default_rng(seed)
    case = sLSTMCase(rng, T=9 if GPU else 4, D=96 if GPU else 32)
    case.cotangents[1:] = [np.zeros_like(x) for x in case.cotangents[1:]]
    shape = case.inputs["x"][:, :, :2].shape
    case.inputs["x"][:, :, :2] += 1e4 * (rng.integers(0, 3, shape) - 1)
    check_clustered(case, dtype)


@halves
def test_clusters_nan_reaches_the_output(dtype, rng):
    case = sLSTMCase(rng, T=4, D=64 if GPU else 32)
    inputs = [tensor(case.inputs[n], dtype) for n in case.names[:3]]
    state = [tensor(case.inputs[n]) for n in "hcnm"]
    inputs[0][1, 2] = float("nan")
    state[0][2] = float("nan")
    h = keras_xlstm.ops.slstm(*inputs, state, implementation="triton")
    lost = torch.isnan(h).any(3).any(2).cpu().numpy()
    np.testing.assert_array_equal(lost[0], False)
    np.testing.assert_array_equal(lost[1], np.arange(4) >= 2)
    np.testing.assert_array_equal(lost[2], True)


# Those too large for a cluster, by programs of 16 units; interpreted, a launch for every step.


@halves
@pytest.mark.parametrize("D", [288, 320, 512, 768, 992, 1024] if GPU else [96])
@pytest.mark.parametrize("state", [True, False], ids=["carried", "fresh"])
def test_wide_heads(D, dtype, state, rng):
    B, T, H = (9, 70, 1 if D > 700 else 2) if GPU else (9, 3, 1)
    check_wide(sLSTMCase(rng, B=B, T=T, H=H, D=D, state=state), dtype)


@on_gpu
@pytest.mark.parametrize("clusters", [1, 8])
@pytest.mark.parametrize(("B", "D"), [(1, 160), (3, 256), (200, 320)])
def test_wide_heads_in_turn(B, D, clusters, rng, monkeypatch):
    """Several launches, of as many programs as are resident; on older devices smaller heads, too."""
    monkeypatch.setattr(device, "clusters", lambda device: clusters)
    case = sLSTMCase(rng, B=B, T=12, H=2, D=D)
    (check_wide if clusters == 1 or D > 256 else check_clustered)(case, "bfloat16")


@on_gpu
def test_wide_heads_on_a_small_device(rng, monkeypatch):
    """Too few processors for the programs of a head: a launch for every step."""
    monkeypatch.setattr(device, "processors", lambda device: 13)
    check_wide(sLSTMCase(rng, B=9, T=6, H=2, D=320), "bfloat16")


@halves
def test_clusters_give_the_same_bits_again(dtype, rng):
    case = sLSTMCase(rng, B=9, T=50 if GPU else 3, D=192 if GPU else 32)
    inputs = [tensor(case.inputs[n], dtype).requires_grad_() for n in case.names[:3]]
    found = []
    for _ in range(2):
        h = keras_xlstm.ops.slstm(*inputs, implementation="triton")
        found.append([h, *torch.autograd.grad((h.float() ** 2).sum(), inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@on_gpu
def test_clusters_in_a_cuda_graph(rng):
    case = sLSTMCase(rng, B=9, T=20, D=192)
    inputs = [tensor(case.inputs[n], "bfloat16") for n in case.names[:3]]
    assert_same_in_a_cuda_graph(lambda: keras_xlstm.ops.slstm(*inputs, implementation="triton"))
