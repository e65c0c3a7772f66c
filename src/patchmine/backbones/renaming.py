"""Names of a vision transformer's tensors in other people's files, as tables of rules to timm's."""

from __future__ import annotations

import re

import torch

from patchmine.backbones.loading import Tensors

# By naming: the first layer, by which an encoder is found, and regular expressions from its names
# to timm's, applied in turn.
FIRST_LAYER = {
    "timm": "patch_embed.proj.weight",
    "mmpretrain": "patch_embed.projection.weight",
    "transformers": "embeddings.patch_embeddings.projection.weight",
    "transformers' DINOv3": "embeddings.patch_embeddings.weight",
    "transformers' CLIP": "embeddings.patch_embedding.weight",
    "torchvision": "conv_proj.weight",
    "ResNet": "layer1.0.conv1.weight",
    "ConvNeXt": "stages.0.blocks.0.conv_dw.weight",
    "ConvNeXt's authors": "stages.0.0.dwconv.weight",
}
_TO_TIMM: dict[str, dict[str, str]] = {
    "timm": {
        r"^blocks\.\d+\.(\d+)\.": r"blocks.\1."  # DINOv2 in chunks, whose numbers run on
    },
    "mmpretrain": {
        r"^patch_embed\.projection\.": "patch_embed.proj.",
        r"^pre_norm\.": "norm_pre.",
        r"^ln1\.": "norm.",
        r"^ln2\.": "fc_norm.",  # after pooling
        r"^layers\.": "blocks.",
        r"\.ln([12])\.": r".norm\1.",
        r"\.attn\.attn\.in_proj_": ".attn.qkv.",
        r"\.attn\.attn\.out_proj\.": ".attn.proj.",
        r"\.attn\.gamma1\.weight$": ".ls1.gamma",
        r"\.ffn\.gamma2\.weight$": ".ls2.gamma",
        r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.",
        r"\.ffn\.layers\.1\.": ".mlp.fc2.",
    },
    "transformers": {
        r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
        r"^embeddings\.position_embeddings$": "pos_embed",
        r"^embeddings\.(cls_token|mask_token|register_tokens)$": r"\1",
        r"^(encoder\.layer|layers)\.": "blocks.",
        r"^decoder\.mask_token$": "mask_token",
        r"^decoder\.decoder_(encoder\.layer|layers)\.": "decoder_blocks.",
        r"^decoder\.decoder_": "decoder_",
        r"\.attention\.attention\.(query|key|value)\.": r".attn.\1.",
        r"\.attention\.(q|k|v)_proj\.": r".attn.\1.",
        r"\.attention\.(output\.dense|o_proj)\.": ".attn.proj.",
        r"\.layernorm_before\.": ".norm1.",
        r"\.layernorm_after\.": ".norm2.",
        r"\.intermediate\.dense\.": ".mlp.fc1.",
        r"\.output\.dense\.": ".mlp.fc2.",
        r"\.mlp\.weights_in\.": ".mlp.w12.",
        r"\.mlp\.weights_out\.": ".mlp.w3.",
        r"\.layer_scale([12])\.lambda1$": r".ls\1.gamma",
        r"^layernorm\.": "norm.",
    },
    "DINOv3": {
        r"^storage_tokens$": "reg_token",
        r"\.ls([12])\.gamma$": r".gamma_\1",
        r"\.mlp\.w1\.": ".mlp.fc1_g.",
        r"\.mlp\.w2\.": ".mlp.fc1_x.",
        r"\.mlp\.w3\.": ".mlp.fc2.",
    },
    "transformers' DINOv3": {
        r"^embeddings\.patch_embeddings\.": "patch_embed.proj.",
        r"^embeddings\.(cls_token|mask_token)$": r"\1",
        r"^embeddings\.register_tokens$": "reg_token",
        r"^(model\.)?layer\.": "blocks.",
        r"\.attention\.(q|k|v)_proj\.": r".attn.\1.",
        r"\.attention\.o_proj\.": ".attn.proj.",
        r"\.layer_scale([12])\.lambda1$": r".gamma_\1",
        r"\.mlp\.gate_proj\.": ".mlp.fc1_g.",
        r"\.mlp\.up_proj\.": ".mlp.fc1_x.",  # without a gate it is fc1 (`_as_eva`)
        r"\.mlp\.down_proj\.": ".mlp.fc2.",
    },
    "transformers' CLIP": {  # SigLIP too
        r"^embeddings\.patch_embedding\.": "patch_embed.proj.",
        r"^embeddings\.position_embedding\.weight$": "pos_embed",
        r"^embeddings\.class_embedding$": "cls_token",
        r"^pre_layrnorm\.": "norm_pre.",
        r"^post_layernorm\.": "norm.",
        r"^encoder\.layers\.": "blocks.",
        r"\.layer_norm([12])\.": r".norm\1.",
        r"\.self_attn\.(q|k|v)_proj\.": r".attn.\1.",
        r"\.self_attn\.out_proj\.": ".attn.proj.",
    },
    "torchvision": {
        r"^conv_proj\.": "patch_embed.proj.",
        r"^class_token$": "cls_token",
        r"^encoder\.pos_embedding$": "pos_embed",
        r"^encoder\.ln\.": "norm.",
        r"^encoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.",
        r"\.ln_([12])\.": r".norm\1.",
        r"\.self_attention\.in_proj_": ".attn.qkv.",
        r"\.self_attention\.out_proj\.": ".attn.proj.",
        r"\.mlp\.(0|linear_1)\.": ".mlp.fc1.",
        r"\.mlp\.(3|linear_2)\.": ".mlp.fc2.",
    },
    "ConvNeXt's authors": {
        r"^downsample_layers\.0\.": "stem.",
        r"^downsample_layers\.(\d+)\.": r"stages.\1.downsample.",
        r"^stages\.(\d+)\.(\d+)\.": r"stages.\1.blocks.\2.",
        r"\.dwconv\.": ".conv_dw.",
        r"\.pwconv([12])\.": r".mlp.fc\1.",
        r"\.grn\.gamma$": ".mlp.grn.weight",
        r"\.grn\.beta$": ".mlp.grn.bias",
        r"^norm\.": "head.norm.",
    },
    "Swin's authors": {  # they halve the map at the end of a stage, timm at the start of the next
        rf"^layers\.{stage}\.downsample\.": f"layers.{stage + 1}.downsample." for stage in (2, 1, 0)
    },
}
_PACKED = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}
_COMPUTED = re.compile(r"^rope_embed\.|^local_cls_norm\.|\.bias_mask$")
_OF_WINDOWS = re.compile(r"\.(attn_mask|relative_position_index|relative_coords_table)$")
_MLP = re.compile(r"\.mlp\.w(12|3)\.")
_FUSED = (("query", "key", "value"), ("q", "k", "v"))
_SPLIT = ("q_proj", "k_proj", "v_proj")  # of plain ViTs; timm's rotary ones keep them apart


def timm_name(name: str, naming: str) -> str:
    """One tensor's name; what several tensors tell together is `as_timm`'s."""
    for pattern, replacement in _TO_TIMM.get(naming, {}).items():
        name = re.sub(pattern, replacement, name)
    return name


def as_timm(tensors: Tensors) -> Tensors:
    """Tensors whose names are timm's, brought into timm's form."""
    tensors = {name: tensor for name, tensor in tensors.items() if not _OF_WINDOWS.search(name)}
    tensors = _fused(_raised(tensors))
    if "blocks.0.gamma_1" in tensors:
        return _as_eva(tensors)
    return _with_registers(_packed(tensors))


def _as_eva(tensors: Tensors) -> Tensors:
    """DINOv3's in the form of timm's `Eva`: keys have no bias, angles and masks are not stored.

    Biases that are all zero, as in the released B, L and H+, are left out, as timm's models do.
    """
    found: Tensors = {}
    biases = [tensor for name, tensor in tensors.items() if name.endswith(".attn.qkv.bias")]
    biased = any(bool(part.any()) for bias in biases for part in bias.chunk(3)[::2])
    gated = "blocks.0.mlp.fc1_g.weight" in tensors
    for name, tensor in tensors.items():
        if name.endswith(".attn.qkv.bias"):
            before, (query, _, value) = name.removesuffix("qkv.bias"), tensor.chunk(3)
            found |= {f"{before}q_bias": query, f"{before}v_bias": value} if biased else {}
        elif not _COMPUTED.search(name):
            found[name if gated else name.replace(".mlp.fc1_x.", ".mlp.fc1.")] = tensor
    return found


def _raised(tensors: Tensors) -> Tensors:
    """CLIP's table (P + L, D) and class token (D,) as timm has them, with two axes more."""
    raised = dict(tensors)
    for name, rank in (("pos_embed", 2), ("cls_token", 1)):
        if name in tensors and tensors[name].ndim == rank:
            raised[name] = tensors[name].reshape(1, -1, tensors[name].shape[-1])
    return raised


def _fused(tensors: Tensors) -> Tensors:
    """Matrices of queries, keys and values as the one of timm's; a bias that lacks is zero."""
    fused = dict(tensors)
    plain = "blocks.0.mlp.fc1.weight" in tensors
    for first, *others in (*_FUSED, *([_SPLIT] if plain else [])):
        for name in [name for name in tensors if f".attn.{first}." in name]:
            names = [name.replace(f".attn.{first}.", f".attn.{p}.") for p in (first, *others)]
            parts = [fused.pop(part, torch.zeros_like(tensors[name])) for part in names]
            fused[name.replace(f".attn.{first}.", ".attn.qkv.")] = torch.cat(parts)
    return fused


def _packed(tensors: Tensors) -> Tensors:
    """DINOv2's SwiGLU as timm's SwiGLUPacked, where the gate and the values are one matrix."""
    if "blocks.0.mlp.w12.weight" in tensors:
        return {_MLP.sub(lambda n: _PACKED[n[0]], name): tensors[name] for name in tensors}
    if "blocks.0.mlp.gate_proj.weight" not in tensors:
        return tensors
    packed: Tensors = {}
    for name, tensor in tensors.items():
        if ".mlp.gate_proj." in name:
            beside = tensors[name.replace(".gate_proj.", ".up_proj.")]
            packed[name.replace(".gate_proj.", ".fc1.")] = torch.cat([tensor, beside])
        elif ".mlp.up_proj." not in name:
            packed[name.replace(".mlp.down_proj.", ".mlp.fc2.")] = tensor
    return packed


def _with_registers(tensors: Tensors) -> Tensors:
    """DINOv2's register tokens as timm has them: they come after positions were added."""
    if "register_tokens" not in tensors or not {"pos_embed", "cls_token"} <= tensors.keys():
        return tensors
    rest = {name: tensor for name, tensor in tensors.items() if name != "register_tokens"}
    table = tensors["pos_embed"]
    return rest | {
        "reg_token": tensors["register_tokens"],
        "cls_token": tensors["cls_token"] + table[:, :1],
        "pos_embed": table[:, 1:],
    }
