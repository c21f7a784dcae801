"""DistributedDataParallel over two processes: python tests/two_processes.py (by test_triton.py).

Each process trains on its half of a batch; the gradients must be those of the whole batch.
"""

import os
import sys
import tempfile

os.environ["KERAS_BACKEND"] = "torch"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def gradients(model, x):
    (model(x) ** 2).mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def work(rank, file):
    import keras
    import torch
    from torch.nn.parallel import DistributedDataParallel

    import keras_xlstm

    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    keras.utils.set_random_seed(0)
    layer = keras_xlstm.layers.mLSTM(8, num_heads=2, return_sequences=True, use_kernel=True)
    layer.build((4, 20, 3))
    x = torch.randn(4, 20, 3, generator=torch.Generator().manual_seed(0))
    x = x.to(next(layer.parameters()).device)
    want = gradients(layer, x)
    layer.zero_grad()
    got = gradients(DistributedDataParallel(layer), x[2 * rank : 2 * rank + 2])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.distributed.barrier()
    os._exit(0)  # threads of PyTorch's have ended Python with SIGABRT while it was finishing


if __name__ == "__main__":
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (os.path.join(folder, "store"),), nprocs=2)
    print("same gradients")
