"""Going on where a run was stopped: a journal beside the output, a lock, and what must be equal."""

from .identity import difference, fingerprint, kernels, model_identity, texts_identity
from .journal import Journal
from .lock import Lock
from .work import Work, place

__all__ = [
    "Journal",
    "Lock",
    "Work",
    "difference",
    "fingerprint",
    "kernels",
    "model_identity",
    "place",
    "texts_identity",
]
