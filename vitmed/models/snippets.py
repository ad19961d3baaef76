"""How an exported file is loaded, as Python that its model card shows: each ends with a function `probabilities(images)`.

Images uint8 [b, *S, C] as the set stores them -> probabilities [b, K]. What stands here is run by tests as it is written.
"""

import dataclasses

from vitmed.models import build

STABLEHLO = """\
import jax.export
import numpy as np

with open("{file}", "rb") as opened:
    exported = jax.export.deserialize(bytearray(opened.read()))


def probabilities(images):
    return np.asarray(exported.call(images))


print(probabilities(np.zeros({stored}, np.uint8)))
"""

TIMM = """\
import numpy as np
import safetensors.torch
import timm
import torch

model = timm.models.{kind}(
{arguments}
)
model.load_state_dict(safetensors.torch.load_file("{file}"))
model.eval()
mean, std = (torch.tensor(each).view(-1, 1, 1) for each in ({mean}, {std}))


def probabilities(images):
{inverted}\
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
{resized}\
    values = (values.expand(-1, {in_channels}, -1, -1) - mean) / std
    with torch.no_grad():
        return model(values).{activation}.numpy()


print(probabilities(np.zeros({stored}, np.uint8)))
"""
TIMM_RESIZED = '    values = torch.nn.functional.interpolate(values, {size}, mode="bicubic", antialias=True).clamp(0, 1)\n'
INVERTED = "    images = np.negative(images)  # (256 - x) mod 256, as in training\n"

VITMED = """\
import jax
import numpy as np

from vitmed import models
from vitmed.models import inputs

model, params = models.from_pretrained(
    "{file}", image_size={image_size}, patch_size={patch_size}, kernel_size={kernel_size}, in_channels={in_channels}
)
mean, std = models.preprocessing("{file}")


def probabilities(images):
{inverted}\
    values = inputs.prepare(images, in_channels={in_channels}, mean=mean, std=std, image_size={image_size})
    return np.asarray(jax.nn.{activation}(model.apply({{"params": params}}, values)))


print(probabilities(np.zeros({stored}, np.uint8)))
"""


@dataclasses.dataclass(frozen=True)
class Form:
    """What a network is and is fed, as far as loading it takes: *S, C of a stored image, and its sizes, one entry per axis."""

    architecture: build.Architecture
    stored: tuple[int, ...]
    image_size: tuple[int, ...]
    patch_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    in_channels: int
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    multi_label: bool
    inverted: bool

    @property
    def timm_has_it(self) -> bool:
        """Whether timm has a model of this form: images, cut into patches that are the kernel's size, one last norm, a pooling it knows."""
        norms = self.architecture.final_norm and self.architecture.fc_norm
        known = not norms and self.architecture.pooling != "attention"
        return len(self.image_size) == 2 and self.kernel_size == self.patch_size and known


def stablehlo(form: Form, file: str) -> str:
    """How a program is loaded, with nothing but jax and numpy."""
    return STABLEHLO.format(file=file, stored=(2, *form.stored))


def weights(form: Form, file: str) -> str:
    """How weights are loaded: by timm where it has such a model, else by vitmed."""
    fields = {
        "file": file,
        "stored": (2, *form.stored),
        "in_channels": form.in_channels,
        "inverted": INVERTED if form.inverted else "",
    }
    if not form.timm_has_it:
        sizes = {name: getattr(form, name) for name in ("image_size", "patch_size", "kernel_size")}
        return VITMED.format(**fields, **sizes, activation="sigmoid" if form.multi_label else "softmax")
    return TIMM.format(
        **fields,
        kind="deit.VisionTransformerDistilled" if form.architecture.pooling == "distilled" else "VisionTransformer",
        arguments="\n".join(f"    {name}={value!r}," for name, value in timm_arguments(form).items()),
        mean=list(form.mean),
        std=list(form.std),
        resized="" if form.stored[:-1] == form.image_size else TIMM_RESIZED.format(size=form.image_size),
        activation="sigmoid()" if form.multi_label else "softmax(-1)",
    )


def timm_arguments(form: Form) -> dict[str, object]:
    """The arguments of timm's VisionTransformer; what is as timm's defaults have it is left out."""
    one = form.architecture
    fc1 = one.mlp_width * (2 if one.swiglu else 1)
    ratio = fc1 / one.width  # of which timm cuts off what is no whole number
    said = {
        "img_size": form.image_size,
        "patch_size": form.patch_size,
        "in_chans": form.in_channels,
        "num_classes": form.num_classes,
        "embed_dim": one.width,
        "depth": one.depth,
        "num_heads": one.num_heads,
        "mlp_ratio": ratio if int(one.width * ratio) == fc1 else (fc1 + 0.5) / one.width,
        "global_pool": {"cls": "token", "distilled": "token", "mean": "avg", "map": "map"}[one.pooling],
        "fc_norm": one.fc_norm,
        "final_norm": one.final_norm or one.fc_norm,  # in timm `fc_norm` says where, this whether there is one
    }
    if one.pooling != "distilled":
        said |= {"class_token": one.class_token, "reg_tokens": one.num_registers, "no_embed_class": not one.prefix_positions}
    said |= {"init_values": 1e-5} if one.layer_scale else {}
    if one.swiglu:
        said |= {"mlp_layer": _Name("timm.layers.SwiGLUPacked"), "act_layer": _Name("torch.nn.SiLU")}
    return said


class _Name(str):
    """A name in the code, not a text."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
