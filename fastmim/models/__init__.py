"""Encoders with timm's names, constructor habits and state-dict keys; decoders and tokenizers of the methods."""

from fastmim.models.beit import Beit
from fastmim.models.convnext import ConvNeXt
from fastmim.models.encoder import Encoder, Insertion
from fastmim.models.registry import create_encoder, list_encoders
from fastmim.models.resnet import ResNet
from fastmim.models.vit import VisionTransformer

__all__ = ["Beit", "ConvNeXt", "Encoder", "Insertion", "ResNet", "VisionTransformer", "create_encoder", "list_encoders"]
