"""The official models' weights: their names and their layouts."""

import collections.abc
import re
from collections import namedtuple

import numpy as np

from keras_xlstm.convert.safetensors import Tensor, widened
from keras_xlstm.layers import mLSTMBlock, sLSTMBlock
from keras_xlstm.models import xLSTMLanguageModel

# ---------------------------------------------------------------- the maps, official name to ours

# How an official array becomes ours, of a given shape, and back.
_Kind = namedtuple("_Kind", "ours theirs")
_SAME = _Kind(lambda a, shape: a, lambda a: a)
_T = _Kind(lambda a, shape: a.T, lambda a: a.T)
# The paper's norms store scale - 1.
_SCALE = _Kind(lambda a, shape: 1 + widened(a), lambda a: a - 1)
_FLAT = _Kind(lambda a, shape: a.reshape(shape), lambda a: a.reshape(-1))
_BLOCKS = _Kind(lambda a, shape: a.swapaxes(1, 2), lambda a: a.swapaxes(1, 2))
_TAPS = _Kind(lambda a, shape: a[:, 0].T, lambda a: a.T[:, None])
# Our recurrent kernel is (head, in, gate, out), the bias (gate, head, out).
_R = _Kind(
    lambda a, s: a.reshape(s[0], s[2], s[3], s[1]).transpose(0, 3, 1, 2),
    lambda a: a.transpose(0, 2, 3, 1).reshape(a.shape[0], -1, a.shape[1]),
)
_R_CUDA = _Kind(lambda a, shape: a.reshape(shape), lambda a: a.reshape(*a.shape[:2], -1))
_BIAS_CUDA = _Kind(
    lambda a, s: a.reshape(s[1], s[0], s[2]).swapaxes(0, 1),
    lambda a: a.swapaxes(0, 1).reshape(-1),
)

_CONV = [
    ("xlstm.conv1d.conv.weight", "convolution.kernel", _TAPS),
    ("xlstm.conv1d.conv.bias", "convolution.bias", _SAME),
]
_MLSTM = [
    ("xlstm_norm.weight", "norm.gamma", _SCALE),
    ("xlstm.proj_up.weight", "up_projection.kernel", _T),
    ("xlstm.proj_up.bias", "up_projection.bias", _SAME),
    *_CONV,
    ("xlstm.q_proj.weight", "query.kernel", _BLOCKS),
    ("xlstm.q_proj.bias", "query.bias", _FLAT),
    ("xlstm.k_proj.weight", "key.kernel", _BLOCKS),
    ("xlstm.k_proj.bias", "key.bias", _FLAT),
    ("xlstm.v_proj.weight", "value.kernel", _BLOCKS),
    ("xlstm.v_proj.bias", "value.bias", _FLAT),
    ("xlstm.mlstm_cell.igate.weight", "input_gate.kernel", _T),
    ("xlstm.mlstm_cell.igate.bias", "input_gate.bias", _SAME),
    ("xlstm.mlstm_cell.fgate.weight", "forget_gate.kernel", _T),
    ("xlstm.mlstm_cell.fgate.bias", "forget_gate.bias", _SAME),
    ("xlstm.mlstm_cell.outnorm.weight", "head_norm.gamma", _SCALE),
    ("xlstm.learnable_skip", "skip", _SAME),
    ("xlstm.proj_down.weight", "down_projection.kernel", _T),
    ("xlstm.proj_down.bias", "down_projection.bias", _SAME),
]
KERNEL, _BIAS = "xlstm.slstm_cell._recurrent_kernel_", "xlstm.slstm_cell._bias_"
_SLSTM = [
    ("xlstm_norm.weight", "norm.gamma", _SCALE),
    *_CONV,
    # The official layer hands its fgate to the cell's input gate and its igate to the forget gate.
    ("xlstm.fgate.weight", "input_gate.kernel", _BLOCKS),
    ("xlstm.igate.weight", "forget_gate.kernel", _BLOCKS),
    ("xlstm.zgate.weight", "cell_input.kernel", _BLOCKS),
    ("xlstm.ogate.weight", "output_gate.kernel", _BLOCKS),
    (KERNEL, "recurrent_kernel", _R),
    (_BIAS, "bias", _FLAT),
    ("xlstm.group_norm.weight", "head_norm.gamma", _SCALE),
    ("ffn_norm.weight", "feed_forward_norm.gamma", _SCALE),
    ("ffn.proj_up.weight", "feed_forward.up_projection.kernel", _T),
    ("ffn.proj_down.weight", "feed_forward.down_projection.kernel", _T),
]
_SLSTM_CUDA = [(n, ours, {KERNEL: _R_CUDA, _BIAS: _BIAS_CUDA}.get(n, k)) for n, ours, k in _SLSTM]
# Several names: their rows follow one another.
_LARGE = [
    ("norm_mlstm.weight", "norm.scale", _SAME),
    ("mlstm_layer.q.weight", "query.kernel", _T),
    ("mlstm_layer.k.weight", "key.kernel", _T),
    ("mlstm_layer.v.weight", "value.kernel", _T),
    ("mlstm_layer.ogate_preact.weight", "output_gate.kernel", _T),
    ("mlstm_layer.igate_preact.weight", "input_gate.kernel", _T),
    ("mlstm_layer.igate_preact.bias", "input_gate.bias", _SAME),
    ("mlstm_layer.fgate_preact.weight", "forget_gate.kernel", _T),
    ("mlstm_layer.fgate_preact.bias", "forget_gate.bias", _SAME),
    ("mlstm_layer.multihead_norm.weight", "head_norm.gamma", _SAME),
    ("mlstm_layer.out_proj.weight", "output_projection.kernel", _T),
    ("norm_ffn.weight", "feed_forward_norm.scale", _SAME),
    ("ffn.proj_up_gate.weight ffn.proj_up.weight", "feed_forward.up_projection.kernel", _T),
    ("ffn.proj_down.weight", "feed_forward.down_projection.kernel", _T),
]
QKVO = "mlstm_layer.qkv_opreact.weight"
_LARGE_FUSED = [
    (QKVO, "query.kernel key.kernel value.kernel output_gate.kernel", _T),
    ("mlstm_layer.ifgate_preact.weight", "input_gate.kernel forget_gate.kernel", _T),
    ("mlstm_layer.ifgate_preact.bias", "input_gate.bias forget_gate.bias", _SAME),
    ("ffn.proj_up_gate_z.weight", "feed_forward.up_projection.kernel", _T),
    *(row for row in _LARGE if re.match(r"norm|ffn.proj_down|mlstm_layer.(mul|out)", row[0])),
]
_Format = namedtuple("_Format", "embedding stack norm norm_weight norm_kind architecture")
_LARGE_NORM = ("out_norm.weight", "scale", _SAME, "large")
FORMATS = {
    "xlstm": _Format(
        "token_embedding.weight", "xlstm_block_stack.", "post_blocks_norm.weight", "gamma", _SCALE,
        "paper",
    ),
    "xlstm_large": _Format("embedding.weight", "backbone.", *_LARGE_NORM),
    "transformers": _Format("backbone.embeddings.weight", "backbone.", *_LARGE_NORM),
}  # fmt: skip
HEAD = "lm_head.weight"

# Official names, their kind, and ours as (layer, attribute).
_Pair = namedtuple("_Pair", "names kind ours")


def pairs_of(model, format, tensors=()):
    """All pairs of a model in a format; of the layouts that the tensors have, if there are any."""
    official, pairs = FORMATS[format], []
    language = isinstance(model, xLSTMLanguageModel)
    stack = official.stack if language else ""

    def add(root, prefix, rows):
        for names, paths, kind in rows:
            ours = [_found(root, path) for path in paths.split()]
            if None not in ours:
                pairs.append(_Pair([prefix + name for name in names.split()], kind, ours))

    if language:
        add(model.get_layer("embedding"), "", [(official.embedding, "embeddings", _SAME)])
        if not model.settings["tie_embeddings"]:
            add(model.get_layer("head"), "", [(HEAD, "kernel", _T)])
    fused = any(name.endswith(QKVO) for name in tensors)
    for index, block in enumerate(model.blocks):
        prefix = f"{stack}blocks.{index}."
        rows = _LARGE_FUSED if fused else _LARGE
        if isinstance(block, sLSTMBlock):
            size = block.dim // block.num_heads
            # The bias has one shape in both layouts: the kernel's decides.
            cuda = prefix + KERNEL in tensors and (
                np.shape(tensors[prefix + KERNEL])[1:] == (size, 4 * size)
            )
            rows = _SLSTM_CUDA if cuda else _SLSTM
        elif official.architecture == "paper":
            rows = _MLSTM
        add(block, prefix, rows)
    if model.settings["final_norm"]:
        row = (official.norm, official.norm_weight, official.norm_kind)
        add(model.get_layer("norm"), stack, [row])
    return pairs


def _found(root, path):
    *steps, attribute = path.split(".")
    for step in steps:
        root = getattr(root, step)
        if root is None:
            return None
    return None if getattr(root, attribute) is None else (root, attribute)


def official_shapes(pair):
    """Per variable of ours, the shape of its official array."""
    arrays = (np.broadcast_to(np.int8(0), getattr(*ours).shape) for ours in pair.ours)
    return [pair.kind.theirs(array).shape for array in arrays]


def check_format(model, format):
    """A ValueError if a format has no counterpart of the model."""
    settings, blocks = model.settings, model.blocks
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {list(FORMATS)}. Received: format={format!r}.")

    def has(name, value):
        return any(getattr(block, name, value) != value for block in blocks)

    reasons = {
        f'architecture="{settings["architecture"]}"': (
            settings["architecture"] != FORMATS[format].architecture
        ),
        'input_gate="sigmoid"': has("input_gate_activation", "exponential"),
        'forget_activation="exponential"': has("forget_activation", "sigmoid"),
    }
    if format == "xlstm":
        reasons |= {
            "a gate_soft_cap": has("gate_soft_cap", None),
            "a logit_soft_cap": settings.get("logit_soft_cap") is not None,
            "an epsilon other than 1e-5": has("epsilon", 1e-5),
            "mLSTM without a convolution": any(
                isinstance(block, mLSTMBlock) and not block.conv_kernel_size for block in blocks
            ),
        }
    else:
        reasons["use_bias=True without biases of the norms"] = has("use_bias", False)
    if format == "transformers":
        reasons["final_norm=False"] = not settings["final_norm"]
        reasons["no embedding and head"] = not isinstance(model, xLSTMLanguageModel)
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(
            f'The format "{format}" must have a counterpart of the model. Received: a model with '
            f"{' and '.join(found)}, which it has not. model.save writes any model, as .keras."
        )


def some(things):
    """The first ten of some strings, for a message."""
    things = sorted(things)
    more = f" and {len(things) - 10} more" if len(things) > 10 else ""
    return ", ".join(things[:10]) + more


def as_array(value):
    """float32 or float64 NumPy, or the bits of bfloat16 (see `widened`)."""
    if isinstance(value, Tensor):
        value = value.bits()
        if value.dtype == np.uint16:
            return value
    if hasattr(value, "detach"):  # PyTorch: NumPy knows nothing of its bfloat16
        value = value.detach().cpu()
        value = (value.float() if "bfloat16" in str(value.dtype) else value).numpy()
    value = np.asarray(value)
    return value if value.dtype == np.float64 else np.asarray(value, np.float32)


def equal(tensors, *names):
    return np.array_equal(*(widened(as_array(tensors[name])) for name in names))


def format_of(tensors):
    """The format that the names are of."""
    for name in tensors:
        if name.endswith("xlstm_norm.weight"):
            return "xlstm"
        if name.endswith("norm_mlstm.weight"):
            hub = FORMATS["transformers"].embedding in tensors
            return "transformers" if hub else "xlstm_large"
    raise ValueError(
        "`tensors` must be the state dict of an official xLSTMLMModel, xLSTMBlockStack, xLSTMLarge "
        f"or xLSTMForCausalLM. Received: {some(map(repr, tensors)) or 'no tensors'}."
    )


class _Within(collections.abc.Mapping):
    """Tensors under their names without a prefix; each is read when it is asked for."""

    def __init__(self, tensors, prefix):
        self.tensors, self.prefix = tensors, prefix

    def __getitem__(self, name):
        return self.tensors[self.prefix + name]

    def __iter__(self):
        return (name[len(self.prefix) :] for name in self.tensors)

    def __len__(self):
        return len(self.tensors)


_FIRST_NORM = re.compile(r"(.*?)blocks\.\d+\.(?:xlstm_norm|norm_mlstm)\.weight", re.DOTALL)


def without_prefix(tensors):
    """The tensors by their official names: what wrappers put before all of them (`module.` of
    DistributedDataParallel, `model.` of a trainer, any attribute of any model) is left out."""
    before = {match[1] for match in map(_FIRST_NORM.fullmatch, tensors) if match}
    prefixes = sorted({_prefix(stack, tensors) for stack in before})
    if prefixes in ([], [""]):
        return tensors
    others = [name for name in tensors if not name.startswith(prefixes[0])]
    if others or len(prefixes) > 1:
        names = " and ".join(map(repr, prefixes))
        raise ValueError(
            f"`tensors` must be those of one model. Received: a model behind the prefix {names}"
            + (f", and others: {some(map(repr, others))}" if len(prefixes) == 1 else "")
            + ". Give the tensors of one prefix alone: {name: tensor for name, tensor in "
            f"tensors.items() if name.startswith({prefixes[0]!r})}}."
        )
    return _Within(tensors, prefixes[0])


def _prefix(stack, tensors):
    """What stands before a model's names, where `stack` does before those of its blocks."""
    for official in FORMATS.values():
        prefix = stack.removesuffix(official.stack)
        whole = stack == official.stack or prefix + official.embedding in tensors
        if stack.endswith(official.stack) and whole:
            return prefix
    return stack  # of a stack without an embedding
