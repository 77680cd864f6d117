"""Llama 1 to 3: attention, then MLP, each behind its own RMSNorm."""

from .architecture import SEQUENTIAL, Architecture

ARCHITECTURES = (Architecture("llama", SEQUENTIAL),)
