"""Encoders: loading them from every format that they come in, encoding, saving them so that every tool loads them."""

from __future__ import annotations

from clpl_moe.encoder.encoder import Encoder, save_encoder
from clpl_moe.encoder.load import load_encoder

__all__ = ["Encoder", "load_encoder", "save_encoder"]
