"""Policy: which Linear of a run is solved how, and which Linears of a stage are solved together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..checkpoint import Checkpoint
from ..errors import UsageError
from ..recipe import Recipe, Rule
from . import glu
from .settings import Settings, from_recipe, skipped

Plan = dict[str, Settings]  # Linear by full name, in the order of the model -> how it is solved


def make_plan(recipe: Recipe, checkpoint: Checkpoint, source_layers: int) -> Plan:
    """The Linears that the run changes; those that are skipped or dense by a rule are absent.

    Names are those that are written. The patterns of skip and modules are searched in the names of
    the source model, which has source_layers layers; a module that skip means stays as it is,
    whatever the rules say. UsageError for a pattern that matches nothing and for a rule that is
    never the first to match.
    """
    architecture, linears = checkpoint.architecture, checkpoint.architecture.linears()
    pruned = glu.linears(architecture) if recipe.method == "dass" else linears
    every = [f"{architecture.layers}.{i}.{name}" for i in range(source_layers) for name in linears]
    skip = skipped(recipe.skip, every)
    ruled = first_matches(recipe.modules, every)
    base = from_recipe(recipe)
    plan: Plan = {}
    for index, source in enumerate(checkpoint.source_layers):
        for name in pruned:
            known = f"{architecture.layers}.{source}.{name}"
            rule = ruled.get(known)
            if known not in skip and not (rule is not None and rule.dense):
                settings = base if rule is None else by_rule(base, rule)
                plan[f"{architecture.layers}.{index}.{name}"] = settings
    if recipe.method == "dass":
        glu.check(plan, recipe, checkpoint)
    return plan


def first_matches(rules: Iterable[Rule], modules: list[str]) -> dict[str, Rule]:
    """The first rule that matches each module, where any does.

    UsageError for a rule that matches nothing or only what earlier rules have taken.
    """
    found: dict[str, Rule] = {}
    for number, rule in enumerate(rules, 1):
        hits = [name for name in modules if re.search(rule.match, name)]
        if not hits:
            raise UsageError(
                f"rule {number} of modules ({rule.match!r}) matches none of the "
                f"{len(modules)} Linears"
            )
        fresh = [name for name in hits if name not in found]
        if not fresh:
            raise UsageError(
                f"rule {number} of modules ({rule.match!r}) comes too late: earlier rules decide "
                f"all of the {len(hits)} Linears that it matches"
            )
        found |= dict.fromkeys(fresh, rule)
    return found


def by_rule(base: Settings, rule: Rule) -> Settings:
    """The settings of a run with the pattern of a rule in the place of its own."""
    return replace(
        base,
        method="sparsegpt" if rule.prunes else "gptq",
        sparsity=rule.sparsity,
        nm=rule.nm_pair,
        bits=rule.bits,
        group=base.group if rule.group is None else rule.group,
    )


def groups(plan: Mapping[str, Settings], prefix: str, names: Iterable[str]) -> list[list[str]]:
    """Those of names (of one stage, within the layer) that the plan holds, by their settings: each
    group is one stack. They stand in the order of their first members.
    """
    found: dict[Settings, list[str]] = {}
    for name in names:
        if f"{prefix}.{name}" in plan:
            found.setdefault(plan[f"{prefix}.{name}"], []).append(name)
    return list(found.values())


def shares_statistics(plan: Mapping[str, Settings], checkpoint: Checkpoint) -> bool:
    """Whether some stage is solved in several stacks, so that its Hessian is held twice."""
    architecture = checkpoint.architecture
    return any(
        len(groups(plan, f"{architecture.layers}.{index}", stage.names)) > 1
        for index in range(checkpoint.config.num_hidden_layers)
        for stage in architecture.stages
    )
