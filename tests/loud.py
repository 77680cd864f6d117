"""Random models whose layers matter, and what transformers itself says of them without some."""

import copy

import numpy as np
import tiny
import torch
from transformers import AutoModelForCausalLM

from distaya_ext.models import describe
from distaya_ext.models.depth import remove_layers

KINDS = ["sliding_attention", "full_attention"]


def config(family, layers=4, **more):
    """A tiny family with more layers, weights large enough that each layer changes the logits, and
    a scale and a cap of logits that both matter.
    """
    found = copy.deepcopy(tiny.FAMILIES[family])
    found.num_hidden_layers, found.initializer_range = layers, 0.2
    if len(set(getattr(found, "layer_types", None) or [])) > 1:
        found.layer_types = [KINDS[i % 4 == 3] for i in range(layers)]
    elif getattr(found, "layer_types", None) is not None:
        found.layer_types = [found.layer_types[0]] * layers
    if family.startswith("cohere"):
        found.logit_scale = 0.5
    if family == "gemma2":
        found.final_logit_softcapping = 1.5
    for key, value in more.items():
        setattr(found, key, value)
    return found


def without(folder, dropped=(), silent=None):
    """The model of transformers with these layers really gone; silent=(layer, name of its last
    Linear): that block's weights are zero.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if silent is not None:
        layer, name = silent
        linear = model.model.layers[layer].get_submodule(name)
        torch.nn.init.zeros_(linear.weight)
        if linear.bias is not None:
            torch.nn.init.zeros_(linear.bias)
    left = [i for i in range(model.config.num_hidden_layers) if i not in dropped]
    remove_layers(model, describe(model.config), left)
    return model


@torch.no_grad()
def log_probabilities(model, ids):
    """Float64 [windows, length - 1, vocabulary] of the whole logits of a model's own forward."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)


def losses(dense, other, ids):
    """Mean KL and delta NLL per window, float64, of two models' log probabilities."""
    kl = (dense.exp() * (dense - other)).sum(-1).mean(1)
    nll = [-p.gather(-1, ids[:, 1:, None])[..., 0].mean(1) for p in (dense, other)]
    return kl.numpy(), (nll[1] - nll[0]).numpy()


def per_language(values, languages):
    """[languages] means over the windows of each, by name in order."""
    names = sorted(set(languages))
    return np.array([values[[lang == name for lang in languages]].mean() for name in names])


@torch.no_grad()
def states(model, ids):
    """Float64 hidden states before each layer and after the last [layers + 1, ...]."""
    found = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    last = model.model.layers[-1].register_forward_hook(
        lambda _, args, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    model(input_ids=ids, use_cache=False)
    for hook in [*hooks, last]:
        hook.remove()
    return torch.stack(found).double()
