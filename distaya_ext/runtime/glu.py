"""Gated MLPs whose gate and up are packed alike run as one kernel: act(x gate^T) * (x up^T)."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import sqgemm
from .modules import PackedLinear, like, without_gradient

# Classes of transformers and torch, by name, so that neither a version nor an import matters.
_ACTS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}
_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


class PackedGLU(nn.Module):
    """down(act(gate(x)) * up(x)) with the parts, and so the names in a state dict, of the MLP.

    The product is one kernel while gate and up have the same format (each may have a pattern of its
    own); otherwise, and while someone hooks them, they run one by one.
    """

    def __init__(self, mlp: nn.Module, act: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = mlp.gate_proj, mlp.up_proj
        self.down_proj, self.act_fn = mlp.down_proj, mlp.act_fn
        self.act = act

    def fused(self) -> bool:
        """Whether gate and up run as one kernel now."""
        gate, up = self.gate_proj, self.up_proj
        if not (isinstance(gate, PackedLinear) and isinstance(up, PackedLinear)):
            return False  # made dense again, or with LoRA beside
        if gate.trains or up.trains:
            return False  # the one kernel has no gradient
        return gate.packed is not None and gate.spec == up.spec and not _hooked(gate, up)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        if not self.fused():
            return self.down_proj(self.act_fn(gate(x)) * up(x))
        x = without_gradient(x).contiguous()
        product = sqgemm.sqgemm_glu(
            x,
            gate.packed,
            up.packed,
            gate.spec,
            self.act,
            like(gate.bias, x),
            like(up.bias, x),
            gate.exact,
        )
        return self.down_proj(product)


def fuse(model: nn.Module) -> int:
    """Put a PackedGLU in the place of every MLP that can be one; returns how many there were."""
    found = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            act = fusible(child)
            if act is not None:
                setattr(parent, name, PackedGLU(child, act).train(child.training))
                found += 1
    return found


def fusible(mlp: nn.Module) -> str | None:
    """The kernel's name of the activation of a gated MLP with packed gate and up, or None.

    An MLP is known by its parts: exactly gate_proj, up_proj, down_proj and act_fn, no parameter or
    buffer of its own. In every supported architecture that is down(act(gate(x)) * up(x)).
    """
    if isinstance(mlp, PackedGLU) or sorted(dict(mlp.named_children())) != sorted(_PARTS):
        return None
    if list(mlp.parameters(recurse=False)) or list(mlp.buffers(recurse=False)):
        return None
    gate, up = mlp.gate_proj, mlp.up_proj
    if not (isinstance(gate, PackedLinear) and isinstance(up, PackedLinear)):
        return None
    if gate.spec != up.spec:
        return None
    return activation(mlp.act_fn)


def activation(act: nn.Module) -> str | None:
    """silu, gelu or gelu_tanh; None for any other function."""
    name = type(act).__name__
    if name == "GELU" and isinstance(act, nn.GELU):
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return _ACTS.get(name)


def _hooked(*modules: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules)
