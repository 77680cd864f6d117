"""Mistral: the Llama block with sliding-window attention."""

from .architecture import SEQUENTIAL, Architecture

ARCHITECTURES = (Architecture("mistral", SEQUENTIAL),)
