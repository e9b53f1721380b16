"""Small encoders of each family for the tests of methods."""

from fastmim.models import Encoder, create_encoder


def small_vit(img_size: int | tuple[int, int] = 32, patch_size: int = 8, **kwargs) -> Encoder:
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, **kwargs}
    return create_encoder("vit_tiny_patch16_224", img_size=img_size, patch_size=patch_size, **sizes)


def small_resnet(**kwargs) -> Encoder:
    return create_encoder("resnet18", **{"layers": (1, 1, 1, 1), **kwargs})


def small_convnext(**kwargs) -> Encoder:
    return create_encoder("convnext_atto", **{"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), **kwargs})


def small_convnextv2(**kwargs) -> Encoder:
    return create_encoder("convnextv2_atto", **{"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24), **kwargs})
