"""What the files of a folder of ours hold, as typed records; what is unknown in them is ignored.

Numbers are finite, whole where they count, and in the units their writers give: nats per token,
bytes, seconds, tokens per second.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

Interval = tuple[float, float]
_MOST = 1e18


class Record(BaseModel):
    """A part of a file. A number that is none, or not finite, is an error of the file."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="after")
    @classmethod
    def _sensible(cls, value: Any) -> Any:
        _check_sizes(value)
        return value


def _check_sizes(value: Any) -> None:
    """ValueError for numbers beyond any that a run measures: sums of them would overflow."""
    if isinstance(value, (int, float)) and abs(value) > _MOST:
        raise ValueError(f"a number beyond {_MOST:g} is none that was measured")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            _check_sizes(each)


class CalibrationLanguage(Record):
    """fertility: tokens per character; share and error by layer, see LanguageReport.summary()."""

    windows: int = 0
    tokens: int = 0
    fertility: float | None = None
    bytes_per_token: float | None = None
    share: list[float] = []
    error: list[float] = []


class Calibration(Record):
    """The texts a compression looked at."""

    tokens: int = 0
    window: int = 0
    tokens_per_language: dict[str, int] = {}
    weights: str | dict[str, float] = "proportional"
    languages: dict[str, CalibrationLanguage] = {}


class Totals(Record):
    """Sums over the Linears that were compressed."""

    modules: int = 0
    weights: int = 0
    zeros: int = 0
    sparsity: float = 0.0
    loss: float | None = None
    bytes: int = 0
    bits_per_weight: float = 0.0
    floored: int = 0
    dead: int = 0
    seconds: float = 0.0


class End(Record):
    """The embedding or the head. shape: "ROWSxCOLUMNS"."""

    shape: str
    bits: int | None = None
    bytes: int
    bits_per_weight: float

    @property
    def weights(self) -> int:
        """Numbers in it."""
        rows, _, columns = self.shape.partition("x")
        return int(rows) * int(columns) if rows.isdigit() and columns.isdigit() else 0


class Size(Record):
    """Bytes of the weight files, and what embedding and head take of them."""

    format: str = "dense"
    predicted_bytes: int = 0
    file_bytes: int = 0
    ends: dict[str, End] = {}


class Fallback(Record):
    """One module that was not solved as asked."""

    module: str
    kind: str
    count: int = 1
    what: str | None = None
    degraded: bool = False


class Fallbacks(Record):
    """All of them: counts by kind, the modules, and how many of how many modules they touch."""

    kinds: dict[str, int] = {}
    modules: list[Fallback] = []
    degraded: int = 0
    of: int = 0


class Results(Record):
    """results.json."""

    versions: dict[str, str] = {}
    machine: dict[str, Any] | None = None
    method: str
    quality: str | None = None
    model_type: str = ""
    dropped_layers: list[int] = []
    calibration: Calibration = Calibration()
    proof: dict[str, Any] | None = None
    totals: Totals
    size: Size
    notices: list[str] = []
    fallbacks: Fallbacks | None = None


class Language(Record):
    """One language of an evaluation, as evaluate.LanguageResult."""

    language: str
    samples: int
    tokens: int
    nll: float
    bits_per_byte: float
    nll_interval: Interval | None = None
    base_nll: float | None = None
    base_bits_per_byte: float | None = None
    dnll: float | None = None
    dnll_interval: Interval | None = None
    ppl_ratio: float | None = None
    kl: float | None = None
    kl_p99: float | None = None
    agreement: float | None = None
    over_english: float | None = None
    over_english_interval: Interval | None = None
    wrong_script: float | None = None
    base_wrong_script: float | None = None


class Sample(Record):
    """What the models make of the same beginning."""

    language: str
    prompt: str
    model: str
    base: str | None = None


class Evaluated(Record):
    """One evaluation: languages worst first."""

    model: str
    base: str | None = None
    mode: str = "windows"
    window: int | None = None
    nll: float
    base_nll: float | None = None
    dnll: float | None = None
    gap: float | None = None
    languages: list[Language] = Field(min_length=1)
    samples: list[Sample] = []
    seconds: float = 0.0
    notes: list[str] = []


class Change(Record):
    """A figure of an earlier run beside this one's."""

    what: str
    was: float
    now: float
    worse: bool


class Before(Record):
    """The earlier run and what changed since; version and time (ISO, UTC) are that run's."""

    time: str = ""
    version: str = ""
    changes: list[Change] = []


class Evaluations(Record):
    """evaluation.json. gate: why it failed. asked: the limits that were set, by name."""

    steps: dict[str, Evaluated] = Field(min_length=1)
    gate: str | None = None
    asked: dict[str, float] = {}
    before: Before | None = None

    @property
    def last(self) -> Evaluated:
        """Of what is in the folder."""
        return list(self.steps.values())[-1]


class SpeedRow(Record):
    """One model of `distaya bench model`."""

    name: str
    weights: str
    threads: int
    nbytes: int = Field(gt=0)
    prompt: int
    prefill_rate: float = Field(gt=0)
    new: int
    decode_rate: float = Field(gt=0)
    contended: bool = False
    graph_rate: float | None = Field(None, gt=0)

    def same_work(self, dense: SpeedRow) -> bool:
        """Whether both do the same on as many bytes, so that what differs is noise."""
        return (self.weights, self.nbytes) == (dense.weights, dense.nbytes)


class Speed(Record):
    """speed.json. read: GB/s that memory gave in the same run, None where it was not measured."""

    machine: dict[str, Any] = {}
    ratios: dict[str, float] | None = None
    rows: list[SpeedRow] = Field(min_length=1)
    read: float | None = None
    in_cache: bool = False
    before: Before | None = None


class Course(Record):
    """How a training went. held_out: (step, nats per label)."""

    steps: int
    best_step: int | None = None
    best_loss: float | None = None
    held_out: list[tuple[int, float]] = []
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    parameters: int = 0


class Training(Record):
    """training.json. before, after: language -> {labels, nll, kl} on held-out text."""

    course: Course
    spec: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    versions: dict[str, str] = {}
    before: dict[str, dict[str, float]] = {}
    after: dict[str, dict[str, float]] = {}


class Influence(Record):
    """What layers.json says of each candidate: {score: {"mean": [...]}} in their order."""

    candidates: list[str] = []
    scores: dict[str, dict[str, Any]] = {}


class Layers(Record):
    """layers.json."""

    dropped: list[int] = []
    score: str = ""
    layers: Influence = Influence()


class Step(Record):
    """A step of a chain."""

    name: str
    seconds: float = 0.0
    fingerprint: str = ""


class Steps(Record):
    """steps.json."""

    version: str = ""
    steps: list[Step] = []


class Module(Record):
    """A line of layers.csv."""

    module: str
    shape: str = ""
    loss: float | None = None
    relative_loss: float | None = None
    sparsity: float = 0.0
    bits: int | None = None
    bytes: int = 0
    bits_per_weight: float = 0.0
    floored: int = 0
    dead: int = 0
    method: str = ""
    pattern: str | None = None
    source_layer: int = 0
    seconds: float = 0.0

    @property
    def layer(self) -> int | None:
        """Number in the model that was written."""
        return next((int(part) for part in self.module.split(".") if part.isdigit()), None)

    @property
    def kind(self) -> str:
        """What it is in its layer, such as q_proj."""
        return self.module.rpartition(".")[2]
