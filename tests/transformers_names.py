"""timm's ViT under the names that transformers gives its own, written down apart from what edgepet knows of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

State = dict[str, torch.Tensor]
Names = Mapping[str, str | tuple[str, ...]]
OLD_NAMES: Names = {  # timm's parts of names, those of transformers 4
    "blocks.": "vit.encoder.layer.", "attn.proj": "attention.output.dense", "norm1": "layernorm_before",
    "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    "cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "head": "classifier",
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
}  # fmt: skip
NEW_NAMES: Names = {  # and of 5
    **OLD_NAMES,
    "blocks.": "vit.layers.", "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
}  # fmt: skip


def respelled(state: State, names: Names) -> State:
    """A ViT as transformers keeps it: query, key and value apart, and a pooler that no classifier reads."""
    found = {"vit.pooler.dense.weight": torch.ones(64, 64)}
    for name, tensor in state.items():
        for ours, theirs in names.items():
            if isinstance(theirs, str):
                name = name.replace(ours, theirs)
        name = f"vit.layernorm{name.removeprefix('norm')}" if name.startswith("norm") else name
        for part, leaf in zip(tensor.chunk(3), names["attn.qkv"], strict=True) if "attn.qkv" in name else ():
            found[name.replace("attn.qkv", leaf)] = part.clone()
        if "attn.qkv" not in name:
            found[name] = tensor
    return found
