"""Fuzz targets that need no file: packed buffers in the kernels, tensors and configs of formats.

Everything here runs under AddressSanitizer too, where a read out of bounds cannot stay unseen.
"""

import torch
from fuzzing import Dice, Target, edited, guarded
from grids import grid_of, standard
from packed import CASES, content

from distaya_ext.formats import ModuleScheme, read_scheme
from distaya_ext.ops import pack as P
from distaya_ext.ops import sqgemm

SHAPES = [(0, 5), (1, 1), (65, 129), (70, 283), (64, 128), (130, 32)]
_INT64 = [0, 1, -1, 8, 15, 16, 63, 64, 128, 1 << 16, 1 << 31, 1 << 32, 1 << 62, -(1 << 63)]


def aligned(data: bytes) -> torch.Tensor:
    """uint8 [bytes] at an address that is a multiple of 64, as the kernels ask for.

    Its memory ends where it ends, so that a sanitizer sees the first byte read beyond.
    """
    own = torch.empty(len(data), dtype=torch.uint8)
    assert own.data_ptr() % 64 == 0
    return own.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8)) if data else own


def _buffers(_: object) -> list[P.PackedWeight]:
    found = []
    for i, (kind, nm) in enumerate(CASES):
        for symmetric in (True, False):
            rows, cols = SHAPES[(2 * i + symmetric) % len(SHAPES)]
            group = (32, 64, 128, 0)[i % 4]
            codes, scales, zeros = content(kind, rows, cols, group, symmetric, nm=nm, seed=i)
            found.append(P.pack(codes, scales, zeros, kind=kind, group=group, nm=nm))
    return found


def _buffer(state: list, dice: Dice) -> None:
    packed = dice.choose(state)
    form, data = packed.format, bytearray(packed.data.numpy().tobytes())
    for _ in range(dice.below(6)):
        if not data:
            break
        at = dice.below(min(len(data), 64) if dice.byte() % 2 else len(data))
        if dice.byte() % 2:  # a whole number, such as an offset of int4-mask
            start = at // 8 * 8
            data[start : start + 8] = dice.choose(_INT64).to_bytes(8, "little", signed=True)
        else:
            data[at] = dice.byte()
    if dice.byte() % 4 == 1:
        del data[dice.below(len(data) + 1) :]
    if dice.byte() % 4 == 1:
        with guarded():
            kind, nm = dice.choose(CASES)
            rows, cols = dice.choose([form.rows, 200]), dice.choose([form.cols, 64])
            group = dice.choose(P.GROUPS)
            form = P.Format(kind, rows, cols, group, bool(dice.byte() % 2), form.scale_dtype, nm)
    hurt = P.PackedWeight(aligned(bytes(data)), form)
    rows = torch.tensor([dice.choose([0, 1, -1, 64, form.rows - 1, form.rows, 1 << 40])])
    x = torch.ones(1 + dice.below(3), form.cols, dtype=torch.bfloat16)
    exact = bool(dice.byte() % 2)
    for use in (
        lambda: P.unpack(hurt),
        lambda: P.dequantize(hurt),
        lambda: P.gather(hurt, rows),
        lambda: sqgemm.linear(x, hurt, exact=exact),
        lambda: sqgemm.glu(x, hurt, hurt, exact=exact),
    ):
        with guarded():
            _as_ours(use)


def _as_ours(use) -> None:
    """The kernels' own door raises plain ValueError, which is its contract."""
    from distaya_ext.errors import DistayaError, InputError

    try:
        use()
    except DistayaError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


SCHEMES = [
    ModuleScheme(4, 32, False),
    ModuleScheme(8, 64, True),
    ModuleScheme(3, 0, True),
    ModuleScheme(4, 32, True, indexed=True),
    ModuleScheme(4, 32, False, "bitmask"),
    ModuleScheme(4, 128, True, "bitmask"),
    ModuleScheme(4, 32, True, "gptq", offset=1),
    ModuleScheme(8, 32, False, "gptq"),
]


def _grids(_: object) -> list:
    found = []
    for i, scheme in enumerate(SCHEMES):
        rows, cols = [(24, 96), (8, 33), (1, 130)][i % 3]
        low = scheme.offset
        grid = grid_of(
            5, rows, cols, scheme.bits, scheme.group, scheme.symmetric, pruned=0.5, low=low
        )
        found.append((scheme, rows, cols, scheme.encode(grid)))
    return found


def _grid(state: list, dice: Dice) -> None:
    scheme, rows, cols, whole = dice.choose(state)
    tensors = dict(whole)
    for _ in range(dice.below(5)):
        name = dice.choose(sorted(tensors))
        t = tensors[name].clone()
        way = dice.below(6)
        if way <= 1 and t.numel():
            t = t.contiguous()
            t.view(-1).view(torch.uint8)[dice.below(t.nbytes)] = dice.byte()
        elif way == 2:
            t = t.reshape(-1)[: dice.below(t.numel() + 1)]
        elif way == 3:
            t = t.to(dice.choose([torch.int64, torch.int8, torch.float64, torch.float16]))
        elif way == 4:
            t = t.T if t.dim() == 2 else t
        else:
            name = name + "x"
        tensors[name] = t
    if dice.byte() % 4 == 1:
        tensors.pop(sorted(tensors)[dice.below(len(tensors))])
    if dice.byte() % 4 == 1:
        rows, cols = dice.choose([rows, 0, 1, 97]), dice.choose([cols, 0, 1, 97])
    with guarded():
        grid = scheme.decode(tensors, rows, cols, "the.module")
        grid.dense(torch.float32)
        P.pack(grid.codes, grid.scales, grid.zeros, kind=f"int{grid.bits}", group=grid.group)


_ABOUT = [
    standard(),
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True,
     "dynamic": {"-:.*lm_head": {}, "+:.*up": {"bits": 8}}, "lm_head": False},
    {"quant_method": "distaya", "version": 1, "modules": {
        "m": {"bits": 4, "group": 128, "symmetric": True, "kind": "int4-out", "nm": [2, 4]},
        "n": {"bits": 4, "group": 0, "symmetric": False, "encoding": "bitmask"}}},
]  # fmt: skip


def _scheme(_: object, dice: Dice) -> None:
    about = edited(dice.choose(_ABOUT), dice)
    with guarded():
        scheme = read_scheme({"quantization_config": about})
        for name in ("model.layers.0.mlp.up_proj", "lm_head", "m", "a" * 60):
            if scheme is not None:
                scheme.for_module(name, False)


TARGETS = [
    Target("packed", _buffers, _buffer, slow=2),
    Target("grid", _grids, _grid, slow=2),
    Target("scheme", lambda folder: None, _scheme),
]
