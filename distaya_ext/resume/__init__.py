"""Going on where a run was stopped: a journal beside the output, a lock, and what must be equal."""

from .guest import Guest
from .held import Held, refuse_foreign
from .identity import difference, fingerprint, kernels, model_identity, texts_identity
from .journal import Journal
from .lock import Lock
from .work import Work, place

__all__ = [
    "Guest",
    "Held",
    "Journal",
    "Lock",
    "Work",
    "difference",
    "fingerprint",
    "kernels",
    "model_identity",
    "place",
    "refuse_foreign",
    "texts_identity",
]
