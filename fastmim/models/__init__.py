"""Encoders with timm's names, constructor habits and state-dict keys; decoders and tokenizers of the methods."""

from fastmim.models.encoder import Encoder, Insertion
from fastmim.models.registry import create_encoder, list_encoders

__all__ = ["Encoder", "Insertion", "create_encoder", "list_encoders"]
