"""Encoder, prior, base and decoder (UL section 3 and appendix: ResNet, ViT, multi-level ViT, UViT)."""

from ul_train.networks.encoder import Encoder
from ul_train.networks.uvit import DecoderUViT
from ul_train.networks.vit import LatentViT

__all__ = ["DecoderUViT", "Encoder", "LatentViT"]
