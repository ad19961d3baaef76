"""Remake timm_forms.json: what timm (1.0) and transformers compute for made-up weights of every form of ViT that vitmed reads.

python tests/golden/make.py        # in an environment with torch, timm, transformers and numpy; the tests need none of them but numpy
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import safetensors.numpy
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import made_up

TIMM = {  # name: arguments of timm's VisionTransformer
    "deit": {"num_classes": 3},
    "deit3": {"num_classes": 3, "no_embed_class": True, "init_values": 1e-5},
    "dinov2": {"num_classes": 0, "init_values": 1e-5},
    "dinov2_reg": {"num_classes": 0, "init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
    "swiglu": {"num_classes": 0, "init_values": 1e-5, "mlp_ratio": 4, "mlp_layer": "SwiGLUPacked"},
    "mae": {"num_classes": 3, "global_pool": "avg"},
    "gap": {"num_classes": 3, "global_pool": "avg", "class_token": False, "fc_norm": False},
    "gap_reg": {"num_classes": 3, "global_pool": "avg", "class_token": False, "reg_tokens": 4, "no_embed_class": True, "fc_norm": False},
    "map": {"num_classes": 3, "global_pool": "map", "class_token": False},
    "map_cls": {"num_classes": 3, "global_pool": "map"},
}


def timm_models():
    import timm
    from timm.layers import SwiGLUPacked
    from timm.models import deit, vision_transformer

    sizes = {"img_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    for name, arguments in TIMM.items():
        if "mlp_layer" in arguments:  # as timm builds DINOv2's giant
            arguments = arguments | {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
        yield name, vision_transformer.VisionTransformer(**sizes, **arguments), f"timm {timm.__version__}"
    yield "distilled", deit.VisionTransformerDistilled(**sizes, num_classes=3), f"timm {timm.__version__}"


def google_shapes(width=16, heads=2, patch=4, positions=10):
    """The names and layouts of google-research/vision_transformer's .npz files."""
    shapes = {"cls": [1, 1, width], "embedding/kernel": [patch, patch, 3, width], "embedding/bias": [width]}
    shapes |= {"Transformer/posembed_input/pos_embedding": [1, positions, width], "head/kernel": [width, 3], "head/bias": [3]}
    shapes |= {f"Transformer/encoder_norm/{leaf}": [width] for leaf in ("scale", "bias")}
    for block in (f"Transformer/encoderblock_{number}" for number in range(2)):
        shapes |= {f"{block}/LayerNorm_{number}/{leaf}": [width] for number in (0, 2) for leaf in ("scale", "bias")}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            shapes |= {f"{attention}/{part}/kernel": [width, heads, width // heads], f"{attention}/{part}/bias": [heads, width // heads]}
        shapes |= {f"{attention}/out/kernel": [heads, width // heads, width], f"{attention}/out/bias": [width]}
        for number, (inputs, outputs) in enumerate(((width, 4 * width), (4 * width, width))):
            shapes |= {f"{block}/MlpBlock_3/Dense_{number}/kernel": [inputs, outputs], f"{block}/MlpBlock_3/Dense_{number}/bias": [outputs]}
    return shapes


def filtered_models():
    """Files under their authors' names, as timm converts them."""
    import timm
    from timm.layers import SwiGLUPacked
    from timm.models import vision_transformer

    version = f"timm {timm.__version__}"
    sizes = {"img_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model, shapes = vision_transformer.VisionTransformer(**sizes, num_classes=3), google_shapes()
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez(file, **made_up.state(shapes))
        file.seek(0)
        model.load_pretrained(file.name)
    yield "google_npz", shapes, model, version
    forms = {
        "facebook_dinov2_reg": {"reg_tokens": 4, "no_embed_class": True},
        "facebook_dinov2_swiglu": {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU},
    }
    for name, arguments in forms.items():
        model = vision_transformer.VisionTransformer(**sizes, num_classes=0, init_values=1e-5, **arguments)
        shapes = {"mask_token": [1, 16]}
        for key, value in model.state_dict().items():
            key = key.replace("reg_token", "register_tokens")
            key = key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3") if "swiglu" in name else key
            shapes[key] = [1, 10, 16] if key == "pos_embed" else list(value.shape)
        state = {key: torch.from_numpy(value) for key, value in made_up.state(shapes).items()}
        model.load_state_dict(vision_transformer.checkpoint_filter_fn(state, model))
        yield name, shapes, model, version


def transformers_models():
    import transformers as hf

    sizes = {"image_size": 12, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "layer_norm_eps": 1e-6}
    version = f"transformers {hf.__version__}"
    yield "hf_vit", hf.ViTForImageClassification(hf.ViTConfig(**sizes, intermediate_size=64, hidden_act="gelu", num_labels=3)), version
    yield "hf_deit", hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**sizes, intermediate_size=64, num_labels=3)), version
    yield "hf_dinov2", hf.Dinov2Model(hf.Dinov2Config(**sizes)), version
    yield "hf_dinov2_swiglu", hf.Dinov2Model(hf.Dinov2Config(**sizes, use_swiglu_ffn=True)), version
    yield "hf_dinov2_reg", hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**sizes, num_register_tokens=4)), version
    yield (
        "hf_mae",
        hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**sizes, intermediate_size=64, mask_ratio=0.0, decoder_num_hidden_layers=1)),
        version,
    )


def outputs(name, model, images):
    """Logits, or the pooled features where there is no classifier."""
    if name == "hf_mae":
        # Its encoder shuffles the patches, which the CLS token does not feel.
        return model.vit(images).last_hidden_state[:, 0]
    said = model(images)
    if isinstance(said, torch.Tensor):
        return said
    return said.logits if "logits" in said else said.last_hidden_state[:, 0]


def with_made_up(model):
    """(shapes by the names in a file, the model with made-up weights); transformers' own names in memory are not those of its files."""
    if not hasattr(model, "save_pretrained"):
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict({key: torch.from_numpy(value) for key, value in made_up.state(shapes).items()})
        return shapes, model.eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = f"{folder}/model.safetensors"
        shapes = {key: list(value.shape) for key, value in safetensors.numpy.load_file(file).items()}
        safetensors.numpy.save_file(made_up.state(shapes), file, {"format": "pt"})
        return shapes, type(model).from_pretrained(folder).eval()


def entry(name, shapes, model, version, images):
    with torch.no_grad():
        return {"made_by": version, "shapes": shapes, "outputs": outputs(name, model.eval(), images).tolist()}


def main():
    images = torch.from_numpy(made_up.images().transpose(0, 3, 1, 2))
    table = {}
    for name, model, version in (*timm_models(), *transformers_models()):
        shapes, model = with_made_up(model)
        table[name] = entry(name, shapes, model, version, images)
    for name, shapes, model, version in filtered_models():
        table[name] = entry(name, shapes, model, version, images)
    text = json.dumps(table, indent=None, separators=(",", ":")).replace('},"', '},\n"')
    pathlib.Path(__file__).with_name("timm_forms.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
