"""Run in a process of its own, without Keras: the official models' weights and what they compute.

python tests/originals.py FOLDER

Writes CASE.npz: w/NAME for the state dict, tokens, logits or outputs; of some cases g/NAME, the
gradients of sum(logits * cotangent), and C, n, m of each block; and folders of save_pretrained.
"""

import pathlib
import sys
import types

import numpy as np
import torch
from xlstm import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
    xLSTMLMModel,
    xLSTMLMModelConfig,
)
from xlstm.blocks.slstm.cell import sLSTMCell_cuda
from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig
from xlstm.xlstm_large.utils import convert_single_weights_to_fused_weights

# Of the 13 steps, the Large model's chunks of 8 leave a rest.
B, T, D, V = 2, 13, 32, 11
NATIVE = {
    "chunkwise_kernel": "chunkwise--native_autograd",
    "sequence_kernel": "native_sequence__native",
    "step_kernel": "native",
    "mode": "inference",
    "chunk_size": 8,
    "autocast_kernel_dtype": "float32",
}
# Per case: num_blocks, slstm_at, and options of the stack, of mLSTM, of sLSTM, of its block.
V1 = {
    "v1": (2, [1], {}, {}, {}, {}),
    "v1-stack": (2, [0], {}, {}, {}, {}),
    "v1-mlstm-bias": (1, [], {"bias": True, "add_post_blocks_norm": False}, {}, {}, {}),
    "v1-tied": (2, [1], {"tie_weights": True}, {}, {}, {}),
    "v1-slstm-plain": (2, "all", {}, None, {"conv1d_kernel_size": 0}, {"feedforward": None}),
    "v1-options": (
        3, [1], {"bias": True},
        {"conv1d_kernel_size": 3, "qkv_proj_blocksize": 8, "num_heads": 4, "proj_factor": 3.3},
        {"conv1d_kernel_size": 2}, {"feedforward": FeedForwardConfig(proj_factor=5.0)},
    ),
}  # fmt: skip


def perturbed(model, scale=0.3):
    """No parameter left at zero or one."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in dict.fromkeys(model.parameters()):
            parameter += scale * torch.randn_like(parameter)
    return model.eval()


def arrays(prefix, tensors):
    return {f"{prefix}/{name}": t.detach().numpy() for name, t in tensors.items() if t is not None}


def v1(case):
    torch.manual_seed(0)
    num_blocks, at, options, mlstm, slstm, block = V1[case]
    language = case != "v1-stack"
    config = xLSTMLMModelConfig if language else xLSTMBlockStackConfig
    if mlstm is not None:
        mlstm = mLSTMBlockConfig(mLSTMLayerConfig(**{"num_heads": 2, **mlstm}))
    slstm = sLSTMLayerConfig(backend="vanilla", **{"num_heads": 2, **slstm})
    config = config(
        mlstm_block=mlstm, slstm_block=sLSTMBlockConfig(slstm, **block), slstm_at=at,
        num_blocks=num_blocks, embedding_dim=D, context_length=16, **options,
        **({"vocab_size": V} if language else {}),
    )  # fmt: skip
    model = perturbed((xLSTMLMModel if language else xLSTMBlockStack)(config).double())
    inputs = torch.randint(V, (B, T)) if language else torch.randn(B, T, D).double()
    outputs = model(inputs)
    cotangent = torch.randn_like(outputs)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad((outputs * cotangent).sum(), list(parameters.values()))
    return model, {
        **arrays("w", model.state_dict()),
        **arrays("g", dict(zip(parameters, gradients))),
        **arrays("x", {"inputs": inputs, "outputs": outputs, "cotangent": cotangent}),
    }


def in_cuda_layout(model):
    """The same weights as a model with the CUDA backend holds them."""
    weights = model.state_dict()
    for name, cell in model.named_modules():
        if hasattr(cell, "_recurrent_kernel_ext2int"):
            as_cuda = types.SimpleNamespace(config=cell.config)
            for what in ("_recurrent_kernel", "_bias"):
                logical = getattr(cell, f"{what}_int2ext")(getattr(cell, f"{what}_"))
                turned = getattr(sLSTMCell_cuda, f"{what}_ext2int")(as_cuda, logical)
                weights[f"{name}.{what}_"] = turned.clone()
    return arrays("w", weights)


def large(weight_mode, **options):
    torch.manual_seed(0)
    options = {"embedding_dim": 2 * D, "num_heads": 2, "num_blocks": 2, "vocab_size": V, **options}
    return xLSTMLarge(
        xLSTMLargeConfig(**options, **NATIVE, weight_mode=weight_mode, return_last_states=True)
    ).eval()


def run_large(model):
    torch.manual_seed(2)
    tokens = torch.randint(V, (B, T))
    with torch.no_grad():
        logits, state = model(tokens)
    states = {f"{n}{k}": s for k, block in state.items() for n, s in zip("Cnm", block)}
    return {
        **arrays("w", model.state_dict()),
        **arrays("x", {"inputs": tokens, "outputs": logits, **states}),
    }


def hub(folder):
    from transformers import xLSTMConfig, xLSTMForCausalLM

    torch.manual_seed(0)
    config = xLSTMConfig(
        vocab_size=V, hidden_size=2 * D, num_hidden_layers=2, num_heads=2, gate_soft_cap=4.0,
        output_logit_soft_cap=3.0, norm_eps=1e-4, **NATIVE,
    )  # fmt: skip
    model = perturbed(xLSTMForCausalLM(config))
    tokens = torch.randint(V, (B, T))

    def run(name):
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits
        x = {"inputs": tokens, "outputs": logits}
        np.savez(folder / f"{name}.npz", **arrays("w", model.state_dict()), **arrays("x", x))

    run("hub")
    model.save_pretrained(folder / "hub")
    model.to(torch.bfloat16).save_pretrained(folder / "hub-bf16", max_shard_size="60KB")
    model.float()
    run("hub-bf16")


def write(folder):
    for case in V1:
        model, results = v1(case)
        np.savez(folder / f"{case}.npz", **results)
        if case == "v1":
            cuda = {k: v for k, v in results.items() if k[0] == "x"} | in_cuda_layout(model)
            np.savez(folder / "v1-cuda.npz", **cuda)
    single = perturbed(large("single"))
    np.savez(folder / "large.npz", **run_large(single))
    fused = large("fused")
    fused.load_state_dict(convert_single_weights_to_fused_weights(single.state_dict()))
    np.savez(folder / "large-fused.npz", **run_large(fused))
    options = {"qk_dim_factor": 1.0, "v_dim_factor": 0.5, "ffn_proj_factor": 5.0}
    wide = perturbed(large("single", **options, add_out_norm=False, num_heads=4))
    np.savez(folder / "large-options.npz", **run_large(wide))
    hub(folder)


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]))
