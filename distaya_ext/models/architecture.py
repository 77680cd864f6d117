"""The words of the architecture table: what the driver must know about a family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Linears of one decoder layer that read the same input: one Hessian, one stacked sweep.

    names are relative to the layer and stand in the order their rows are stacked in.
    """

    names: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps its parts and which Linears of a layer share an input, in execution
    order.

    Paths are module paths inside the causal language model. `blocks` are the submodules of a layer
    whose output may be kept and given back as a whole once all their Linears have run; it is the
    output of the last of those Linears. `adds`: a block's output is added to the residual stream as
    it is, with no norm or factor between.
    """

    model_type: str
    stages: tuple[Stage, ...]
    layers: str = "model.layers"
    embed: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    blocks: tuple[str, ...] = ("self_attn", "mlp")
    adds: bool = True

    def linears(self) -> tuple[str, ...]:
        """Names of all Linears of a layer, relative to it, in stage order."""
        return tuple(name for stage in self.stages for name in stage.names)


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
O = ("self_attn.o_proj",)  # noqa: E741  (the letter every checkpoint uses)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = ("mlp.down_proj",)

# A parallel block (one norm feeds attention and MLP) has one wide stage, a sequential one two.
PARALLEL = (Stage(QKV + GATE_UP), Stage(O), Stage(DOWN))
SEQUENTIAL = (Stage(QKV), Stage(O), Stage(GATE_UP), Stage(DOWN))
