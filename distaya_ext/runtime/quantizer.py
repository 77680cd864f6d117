"""The hooks of transformers: a configuration that is kept as it was written, and a quantiser.

Imported only when transformers is (see register.py).
"""

from __future__ import annotations

import copy
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import Entry
from ..checkpoint.folder import adapter_of
from ..checkpoint.reader import read_header
from ..errors import InputError, UsageError
from ..formats import read_scheme
from ..ranks import read_shared
from .dense import to_dense
from .files import fill, read
from .glu import fuse
from .modules import Packed
from .place import check_held, place, prefix
from .register import METHOD, HandedOver
from .swap import freeze


class FolderConfig(QuantizationConfigMixin):
    """quantization_config of a packed folder, exactly as config.json has it.

    quant_method is what transformers looks our hooks up by; the folder's own may be another.
    """

    def __init__(self, **fields: Any) -> None:
        held = fields.get("holds")
        self.ours = isinstance(held, HandedOver)  # distaya_ext loads, and attaches adapters
        self.together = held.together if isinstance(held, HandedOver) else None
        self.fields = dict(held) if isinstance(held, HandedOver) else fields
        self.quant_method = METHOD

    def to_dict(self) -> dict[str, Any]:
        """What save_pretrained writes."""
        return copy.deepcopy(self.fields)


class PackedQuantizer(HfQuantizer):
    """Puts packed modules into the empty model, lets transformers load the rest, fills them.

    requires_calibration: transformers does not quantise with this method, it only loads.
    """

    requires_calibration = True

    def __init__(self, quantization_config: FolderConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # Taken out of the configuration, which the model keeps.
        self._together, quantization_config.together = quantization_config.together, None
        self._modules: dict[str, Packed] = {}
        self._entries: dict[str, Entry] = {}
        self.trains = False  # what runtime.trainable says

    def update_device_map(self, device_map: Any) -> Any:
        """One device only: packed modules are not spread or offloaded."""
        if isinstance(device_map, dict):
            places = {str(place) for place in device_map.values()}
            if len(places) > 1 or "disk" in places:
                raise UsageError(
                    f"packed weights run on one device, not on {', '.join(sorted(places))}"
                )
        return device_map

    def _process_model_before_weight_loading(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        checkpoint_files: list[str] | None = None,
        **_: Any,
    ) -> None:
        together = self._together
        entries = together.entries if together is not None else self._found(checkpoint_files)
        scheme = read_scheme({"quantization_config": self.quantization_config.to_dict()})
        assert scheme is not None
        self._modules = place(model, scheme, dtype or torch.get_default_dtype())
        self._entries = entries
        mine = check_held(self._modules, self._entries)
        # transformers need not read them, and should not say that nobody does.
        endings = "|".join(sorted({re.escape(name.rpartition(".")[2]) for name in mine}))
        names = "|".join(re.escape(name.removeprefix(prefix(model))) for name in self._modules)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        pattern = rf"^({re.escape(prefix(model))})?({names})\.({endings})$"
        model._keys_to_ignore_on_load_unexpected = {*ignored, pattern}

    def _found(self, checkpoint_files: list[str] | None) -> dict[str, Entry]:
        """The tensors of the folder that transformers loads."""
        files = [Path(name) for name in checkpoint_files or []]
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise InputError("packed weights are read from safetensors files and there are none")
        if adapter_of(files[0].parent) is not None and not self.quantization_config.ours:
            warnings.warn(
                f"{files[0].parent.name} has an adapter beside its quantised weights, which "
                "from_pretrained leaves out; use distaya_ext.load",
                stacklevel=2,
            )
        return {n: entry for file in files for n, entry in read_header(file).items()}

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        how = partial(read, self._entries)
        if self._together is not None:
            how = partial(read_shared, self._together)
        fill(self._modules, how, next(model.parameters()).device)
        self._modules, self._entries, self._together = {}, {}, None
        fuse(model)
        return freeze(model)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return to_dense(model, dtype)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Packed models can be saved; the folder loads again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether gradients pass the packed weights, which themselves never learn."""
        return self.trains

    @property
    def is_qat_trainable(self) -> bool:
        """The same, where Trainer asks for parameters of the model itself."""
        return self.trains

    @property
    def is_compileable(self) -> bool:
        """The kernels trace."""
        return True
