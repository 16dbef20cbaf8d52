"""Flattened names: module paths of diffusion models with their dots replaced by underscores, as kohya-ss writes them.

``lora_unet_down_blocks_0_attentions_0_proj_in`` is ``down_blocks.0.attentions.0.proj_in`` of the U-Net. A name alone
cannot be turned back (``down.blocks`` flattens to the same); the sites of a model can be flattened and compared.
"""

from __future__ import annotations

import re

# Prefix of a flattened name -> the model of a pipeline that the module is in, by diffusers' name for it.
COMPONENTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer",
    "lora_prior_unet_": "prior",
    "lora_prior_te_": "prior_text_encoder",
    # LyCORIS on any model.
    "lycoris_": "",
}
# Names of the models of a pipeline, as the first part of a dotted path. A "transformer" may also be a language model's.
PIPELINE = (*filter(None, dict.fromkeys(COMPONENTS.values())), "diffusion_model")
FLAT_ADVICE = "underscores stand for the dots of its module path; convert it for a model, which tells where they were"

# First parts of paths that only one model of a pipeline has.
_ROOTS = {
    **dict.fromkeys(("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out"), "unet"),
    **dict.fromkeys(("time_embedding", "add_embedding"), "unet"),
    **dict.fromkeys(("text_model", "text_projection"), "text_encoder"),
    **dict.fromkeys(("transformer_blocks", "single_transformer_blocks"), "transformer"),
}
_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_SGM = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_SGM_BLOCK = re.compile(r"(?:(input|output)_blocks_(\d+)_(\d)|middle_block_([012]))_(.+)")
# Residual layers of one block of Stable Diffusion, and a sampler behind them.
_BLOCK = 3


def is_flattened(name: str) -> bool:
    """Whether ``name`` is a flattened path.

    Example:
        >>> is_flattened("lora_te1_text_model_encoder_layers_0_mlp_fc1"), is_flattened("lora_te.fc1")
        (True, False)
    """
    return "." not in name and prefix_of(name) != ""


def prefix_of(name: str) -> str:
    """The known prefix of a flattened name, ``""`` when it has none."""
    return next((prefix for prefix in COMPONENTS if name.startswith(prefix) and len(name) > len(prefix)), "")


def in_pipeline(path: str) -> tuple[str, str]:
    """The model of a pipeline that a dotted path is in, and the path in that model; ``""`` where nothing tells.

    Example:
        >>> in_pipeline("unet.conv_in"), in_pipeline("conv_in"), in_pipeline("lm_head")
        (('unet', 'conv_in'), ('unet', 'conv_in'), ('', 'lm_head'))
    """
    first, _, rest = path.partition(".")
    return (first, rest) if first in PIPELINE and rest else (_ROOTS.get(first, ""), path)


def flattened(path: str) -> str:
    """A module path with underscores for dots."""
    return path.replace(".", "_")


def diffusers_spelling(flat: str) -> str:
    """A flattened name of Stability's own U-Net, without its prefix, as diffusers would flatten the same module.

    SDXL files name the modules of the original implementation. Any other name is returned as it is.

    Example:
        >>> diffusers_spelling("input_blocks_4_1_proj_in"), diffusers_spelling("output_blocks_2_2_conv")
        ('down_blocks_1_attentions_0_proj_in', 'up_blocks_0_upsamplers_0_conv')
    """
    if flat in _SGM:
        return _SGM[flat]
    match = _SGM_BLOCK.fullmatch(flat)
    if match is None:
        return flat
    side, number, inner, middle, rest = match.groups()
    if middle is not None:
        place = "attentions_0" if middle == "1" else f"resnets_{int(middle) // 2}"
        return f"mid_block_{place}_{_in_block(rest)}"
    at = int(number) - (side == "input")
    block, layer = divmod(at, _BLOCK)
    where = "down" if side == "input" else "up"
    if rest == "op":
        return f"{where}_blocks_{block}_downsamplers_0_conv"
    # An upsampler is the last of its block, behind an attention where there is one.
    if rest == "conv":
        return f"{where}_blocks_{block}_upsamplers_0_conv"
    return f"{where}_blocks_{block}_{'resnets' if inner == '0' else 'attentions'}_{layer}_{_in_block(rest)}"


def _in_block(rest: str) -> str:
    return _RESNET.get(rest, rest)
