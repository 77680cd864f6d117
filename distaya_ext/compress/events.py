"""What a run tells while it goes: small frozen records, made for progress bars and logs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Notice:
    """Something the user should know; the run goes on."""

    message: str


@dataclass(frozen=True)
class Calibrated:
    """The texts are cut: `tokens` in windows of `window`, the same in every language or by quotas.

    fertility is tokens per character, empty where windows were given instead of texts.
    """

    tokens: int
    window: int
    tokens_per_language: dict[str, int]
    fertility: dict[str, float]


@dataclass(frozen=True)
class Proved:
    """The layer-by-layer replay reproduced the model's own logits (see proof.Proof)."""

    kind: str
    layers: int
    max_abs_diff: float
    exact: bool


@dataclass(frozen=True)
class Planned:
    """Quantised weights will be packed as `format`; the weight files take about `bytes`."""

    format: str
    bytes: int


@dataclass(frozen=True)
class Resumed:
    """A run that was stopped goes on: `done` of `layers` layers are kept from before."""

    done: int
    layers: int


@dataclass(frozen=True)
class LayerStart:
    """Layer `layer` (from 0) of `layers` begins."""

    layer: int
    layers: int


@dataclass(frozen=True)
class StageDone:
    """The Linears `names` of a layer are compressed. loss is half the squared output error
    per token; relative_loss divides it by the dense output's energy (over at most 512 rows per
    matrix). None where no Hessian was taken.
    """

    layer: int
    names: tuple[str, ...]
    loss: float | None
    relative_loss: float | None
    sparsity: float
    floored: int
    dead: int
    seconds: float


@dataclass(frozen=True)
class LanguagesDone:
    """Shares of the languages in the statistics of layer `layer`, summing to 1, and the relative
    squared error of its outputs in each. Told where the dense model runs beside the compressed one.
    """

    layer: int
    shares: dict[str, float]
    errors: dict[str, float]


@dataclass(frozen=True)
class LayerDone:
    """Layer `layer` is written; its outputs are the next layer's inputs."""

    layer: int
    layers: int
    seconds: float


@dataclass(frozen=True)
class FellBack:
    """Where something lesser than asked was done. lines: one per kind and whether that is degraded;
    degraded modules of `of`; total: more than half of them, so that nothing can be trusted.
    """

    lines: tuple[tuple[str, bool], ...]
    degraded: int
    of: int
    total: bool


@dataclass(frozen=True)
class Saved:
    """The output folder is in place, with `shards` weight files of `bytes` in all."""

    out: str
    shards: int
    bytes: int


Event = (
    Notice
    | Calibrated
    | Proved
    | Planned
    | Resumed
    | LayerStart
    | StageDone
    | LanguagesDone
    | LayerDone
    | FellBack
    | Saved
)
