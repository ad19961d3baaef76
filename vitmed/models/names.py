"""Weights under any of the names in use, brought under timm's: what everything else of this package knows.

Known are timm's own names (also DeiT's, MAE's and DINOv2's, with their few differences), Hugging Face transformers' (ViT, DeiT, MAE,
DINOv2) and those of google-research/vision_transformer (the AugReg .npz files). Nothing is read here: tensors are renamed, and what
has to be turned or joined is when it is read. `D` width, `H` heads, `d` width of a head.
"""

import re
from collections.abc import Callable

import numpy as np

from vitmed.models import tensors

Tensors = dict[str, tensors.Tensor]

# A tensor that every scheme has; what precedes it in a file (module., vit., opt/target/) precedes the others too.
ANCHORS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight", "embedding/kernel")

# Differences from timm's names in the files that the authors of DINOv2 and DeiT III give out.
ORIGINAL = (
    (r"register_tokens", r"reg_token"),
    (r"blocks\.(\d+)\.mlp\.w12\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"blocks\.(\d+)\.mlp\.w3\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),
)
TRANSFORMERS = (
    (r"embeddings\.cls_token", r"cls_token"),
    (r"embeddings\.distillation_token", r"dist_token"),
    (r"embeddings\.register_tokens", r"reg_token"),
    (r"embeddings\.position_embeddings", r"pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"encoder\.layers?\.(\d+)\.(?:layernorm_before|norm1)\.(\w+)", r"blocks.\1.norm1.\2"),
    (r"encoder\.layers?\.(\d+)\.(?:layernorm_after|norm2)\.(\w+)", r"blocks.\1.norm2.\2"),
    (r"encoder\.layers?\.(\d+)\.attention\.attention\.(query|key|value)\.(\w+)", r"blocks.\1.attn.\2.\3"),
    (r"encoder\.layers?\.(\d+)\.attention\.output\.dense\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layers?\.(\d+)\.(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layers?\.(\d+)\.(?:output\.dense|mlp\.fc2|mlp\.weights_out)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"encoder\.layers?\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layers?\.(\d+)\.(.+)", r"blocks.\1.\2"),  # whatever else a block has: it is no ViT's, and will be named as such
    (r"layernorm\.(\w+)", r"norm.\1"),
    (r"(?:cls_)?classifier\.(\w+)", r"head.\1"),
    (r"distillation_classifier\.(\w+)", r"head_dist.\1"),
)
_BLOCK, _ATTENTION = r"Transformer/encoderblock_(\d+)/", r"MultiHeadDotProductAttention_\d/"
_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}
GOOGLE = (
    (r"cls", r"cls_token"),
    (r"embedding/(kernel|bias)", r"patch_embed.proj.\1"),
    (r"Transformer/posembed_input/pos_embedding", r"pos_embed"),
    (r"Transformer/encoder_norm/(scale|bias)", r"norm.\1"),
    (_BLOCK + r"LayerNorm_0/(scale|bias)", r"blocks.\1.norm1.\2"),
    (_BLOCK + r"LayerNorm_2/(scale|bias)", r"blocks.\1.norm2.\2"),
    (_BLOCK + _ATTENTION + r"(query|key|value)/(kernel|bias)", r"blocks.\1.attn.\2.\3"),
    (_BLOCK + _ATTENTION + r"out/(kernel|bias)", r"blocks.\1.attn.proj.\2"),
    (_BLOCK + r"MlpBlock_\d/Dense_0/(kernel|bias)", r"blocks.\1.mlp.fc1.\2"),
    (_BLOCK + r"MlpBlock_\d/Dense_1/(kernel|bias)", r"blocks.\1.mlp.fc2.\2"),
    (_BLOCK + r"(.+)", r"blocks.\1.\2"),
    (r"head/(kernel|bias)", r"head.\1"),
)


def to_timm(found: Tensors) -> Tensors:
    """The tensors under timm's names and in PyTorch's layouts; names of no scheme are left as they are."""
    anchored = [
        (anchor, name) for anchor in ANCHORS for name in found if name == anchor or re.fullmatch(rf".*[./]{re.escape(anchor)}", name)
    ]
    if not anchored:
        return found
    anchor, name = min(anchored, key=lambda pair: len(pair[1]))
    prefix = name.removesuffix(anchor)
    # A classifier may stand outside of the part that the prefix names.
    found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    if anchor == "embedding/kernel":
        return _joined({new: tensor for name, old in found.items() for new, tensor in [_from_google(name, old)]})
    scheme = ORIGINAL if anchor == "patch_embed.proj.weight" else TRANSFORMERS
    return _joined({_renamed(name, scheme): tensor for name, tensor in found.items()})


def _renamed(name: str, scheme: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in scheme:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name


def _turned(tensor: tensors.Tensor, shape: tuple[int, ...], turn: Callable[[np.ndarray], np.ndarray]) -> tensors.Tensor:
    return tensors.Tensor(shape, lambda: turn(tensor.read()))


def _from_google(name: str, tensor: tensors.Tensor) -> tuple[str, tensors.Tensor]:
    """A Flax tensor's new name and layout: kernels there are [in, out], with heads apart as [D, H, d] and [H, d, D]."""
    new, shape = _renamed(name, GOOGLE), tensor.shape
    stem, _, leaf = new.rpartition(".")
    if leaf not in _LEAF or stem == "":
        return new, tensor
    new = f"{stem}.{_LEAF[leaf]}"
    if stem == "patch_embed.proj" and len(shape) == 4:
        return new, _turned(tensor, (shape[3], shape[2], shape[0], shape[1]), lambda kernel: kernel.transpose(3, 2, 0, 1))
    if leaf == "kernel" and len(shape) == 2:
        return new, _turned(tensor, shape[::-1], lambda kernel: kernel.T)
    if leaf == "kernel" and len(shape) == 3:
        outputs = shape[2] if stem.endswith("proj") else shape[1] * shape[2]
        inputs = shape[0] * shape[1] if stem.endswith("proj") else shape[0]
        return new, _turned(tensor, (outputs, inputs), lambda kernel: kernel.reshape(inputs, outputs).T)
    if leaf == "bias" and len(shape) == 2:
        return new, _turned(tensor, (shape[0] * shape[1],), lambda bias: bias.reshape(-1))
    return new, tensor


def num_heads(found: Tensors) -> int | None:
    """The heads that Google's files tell by their kernels' shapes; None for the others, which tell nothing."""
    shapes = [tensor.shape for name, tensor in found.items() if name.endswith("encoderblock_0/MultiHeadDotProductAttention_1/query/kernel")]
    return shapes[0][1] if shapes and len(shapes[0]) == 3 else None


def _joined(found: Tensors) -> Tensors:
    """Queries, keys and values as one tensor, as timm has them."""
    joined = dict(found)
    for name in found:
        if match := re.fullmatch(r"(blocks\.\d+\.attn\.)query\.(weight|bias)", name):
            parts = [found.get(f"{match[1]}{part}.{match[2]}") for part in ("query", "key", "value")]
            if None in parts or len({part.shape for part in parts}) != 1:
                continue  # left as they are, and missed by whoever looks for qkv
            for part in ("query", "key", "value"):
                del joined[f"{match[1]}{part}.{match[2]}"]
            joined[f"{match[1]}qkv.{match[2]}"] = _concatenated(parts)
    return joined


def _concatenated(parts: list[tensors.Tensor]) -> tensors.Tensor:
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return tensors.Tensor(shape, lambda: np.concatenate([part.read() for part in parts]))
