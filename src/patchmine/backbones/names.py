"""Names of encoders that are ours and not timm's, and what follows from a name; free of torch."""

from __future__ import annotations

VIDEO_MODELS: dict[str, dict[str, int]] = {  # widths of VideoMAE's S, B, L, H, and timm's Ti
    "video_vit_tiny_patch16": dict(embed_dim=192, depth=12, num_heads=3),
    "video_vit_small_patch16": dict(embed_dim=384, depth=12, num_heads=6),
    "video_vit_base_patch16": dict(embed_dim=768, depth=12, num_heads=12),
    "video_vit_large_patch16": dict(embed_dim=1024, depth=24, num_heads=16),
    "video_vit_huge_patch16": dict(embed_dim=1280, depth=32, num_heads=16),
}


def reads_clips(model: str) -> bool:
    """Whether ``model`` names an encoder of clips, which makes a run one on videos."""
    return model.startswith("video_vit_")
