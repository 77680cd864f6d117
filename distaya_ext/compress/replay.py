"""The calibration on its way through the layers: what each of them is given, and what it leaves."""

from __future__ import annotations

from ..ranks import PartSums, Sum
from .calibrate import Calibration
from .capture import Call, Calls
from .languages import Account, Mixture
from .left_out import LeftOut
from .reconstruct import BATCH_TOKENS, Course
from .store import Store


class Replay:
    """The calibration tokens on their way: hidden states, what waits inside a layer, the calls.

    dense: the same two stores of the dense model's stream, None where nothing aims at it.
    """

    def __init__(
        self,
        calibration: Calibration,
        hidden: Store,
        tape: Store,
        mixture: Mixture,
        left_out: LeftOut,
        dense: tuple[Store, Store] | None = None,
    ):
        self.calibration, self.hidden, self.tape, self.dense = calibration, hidden, tape, dense
        self.mixture, self.left_out = mixture, left_out
        self.calls = Calls()
        self.short: list[Call] = []  # of every layer for a training batch, see course()

    @property
    def batch(self) -> int:
        """Windows of a part in a training batch."""
        ids, parts = self.calibration.ids, self.calibration.parts.count
        return min(len(ids) // parts, max(1, BATCH_TOKENS // ids.shape[1] // parts))

    def course(self, layer: int) -> Course:
        """What a layer is trained on, once its dense twin has run."""
        return Course(
            self.short[layer],
            self.batch,
            self.hidden,
            self.dense[0],
            self.calibration,
            self.mixture,
            left_out=tuple(self.left_out.numbers),
        )

    @property
    def alive_tokens(self) -> int:
        """Of all processes, without the windows that are left out."""
        ids = self.calibration.ids
        return (len(ids) - len(self.left_out.numbers)) * ids.shape[1]

    def adding(self, sums: list[Sum]) -> PartSums:
        """For sums over all windows: close() after a chunk that ends a part, then finish()."""
        return PartSums(self.calibration.parts, sums)

    def look_at_outputs(self, layer: str, store: Store, end: str) -> None:
        """Leave out the windows of which a layer's output, in one of the stores, overflowed."""
        for chunk in range(len(self.calls)):
            self.left_out.look(layer, chunk, [store.get(("hidden", chunk))], self, end=end)
        self.left_out.share()

    def account(self) -> Account:
        """What the layer that has just been finished tells of the languages."""
        if self.dense is not None:
            adding = self.adding(self.mixture.output_sums())
            for chunk in range(len(self.calls)):
                key = ("hidden", chunk)
                ours, dense = self.hidden.get(key), self.dense[0].get(key)
                alive = self.left_out.alive(chunk, len(ours))
                self.mixture.observe(chunk, ours, dense, alive)
                if self.calibration.closes(chunk):
                    adding.close()
            adding.finish()
        return self.mixture.close_layer()
