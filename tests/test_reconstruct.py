"""Reconstruction: what it may change, that it never loses on held-out windows, and its bits."""

import copy

import lockstep
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from distaya_ext.compress import Calibration
from distaya_ext.compress import reconstruct as room
from distaya_ext.compress.at_work import Stack
from distaya_ext.compress.capture import Call
from distaya_ext.compress.languages import Mixture
from distaya_ext.compress.reconstruct import HELD_OUT, Course, reconstruct
from distaya_ext.compress.settings import from_recipe
from distaya_ext.compress.solve import Figures, solve
from distaya_ext.compress.statistic import Statistic
from distaya_ext.compress.store import Store
from distaya_ext.models import describe

WINDOWS = 64
PLANS = {
    "half": {"sparsity": 0.5},
    "2:4": {"nm": "2:4"},
    "2:4+int4": {"nm": "2:4", "bits": 4, "group": 32},
    "int3": {"method": "gptq", "bits": 3, "group": 32, "symmetric": True},
}


@pytest.fixture
def short_steps(monkeypatch):
    """So few random tokens allow no longer ones."""
    monkeypatch.setattr(room, "STEP", 0.005)


class Case:
    """The first layer of a tiny model, compressed, and what its training needs.

    The inputs are the dense ones with noise, as earlier layers would leave them.
    """

    def __init__(self, folder, family="cohere", plan="half", quality="high", windows=WINDOWS,
                 weights="proportional", per_chunk=10, seed=0, batch=4):  # fmt: skip
        source = tiny.make(folder / family, tiny.FAMILIES[family])
        model = AutoModelForCausalLM.from_pretrained(source).eval().requires_grad_(False)
        self.architecture = describe(model.config)
        ids = tiny.windows(windows).ids
        self.languages = [("en", "fr")[i % 3 == 0] for i in range(windows)]
        chunked = Calibration(ids, self.languages, chunk_tokens=per_chunk * ids.shape[1])
        self.layer = model.get_submodule(f"{self.architecture.layers}.0")
        for name in self.architecture.linears():  # loud, or the residual stream drowns them
            self.layer.get_submodule(name).weight.data *= 5
        self.mixture = Mixture(chunked, weights)
        batch = min(windows, batch)
        call = self._call(model, ids[:batch])
        self.inputs, self.targets = Store(), Store()
        noise = torch.Generator().manual_seed(1)
        for chunk, part in enumerate(chunked.chunks()):
            x, y = lockstep.observe(model, self.architecture, 0, part)[""]
            self.targets.put(("hidden", chunk), y)
            x = x + 0.02 * x.std() * torch.randn(x.shape, generator=noise)
            self.inputs.put(("hidden", chunk), x)
        self.stacks = self._compress(model, ids, plan, quality)
        self.course = Course(call, batch, self.inputs, self.targets, chunked, self.mixture, seed)

    def _call(self, model, ids):
        kept = []

        def hook(module, args, kwargs):
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            kept.append(Call(args[1:], rest, not args))

        handle = self.layer.register_forward_pre_hook(hook, with_kwargs=True)
        model(input_ids=ids, use_cache=False)
        handle.remove()
        return kept[0]

    def _compress(self, model, ids, plan, quality):
        settings = from_recipe(tiny.recipe(**PLANS[plan], quality=quality))
        stacks = []
        for stage in self.architecture.stages:
            seen = lockstep.observe(model, self.architecture, 0, ids)
            statistic = Statistic("hessian", seen[stage.names[0]][0].shape[-1], torch.device("cpu"))
            statistic.add(seen[stage.names[0]][0].flatten(0, 1))
            linears = [self.layer.get_submodule(name) for name in stage.names]
            found = solve([m.weight.data for m in linears], settings, statistic)
            shapes, grids, row = {}, {}, 0
            masks = None if found.mask is None else {}
            for name, linear in zip(stage.names, linears, strict=True):
                shapes[name] = tuple(linear.weight.shape)
                part = slice(row, row + linear.out_features)
                linear.weight.data = found.W[part].clone()
                if found.grid is not None:
                    grids[name] = found.grid.part(part.start, part.stop)
                if masks is not None:
                    masks[name] = found.mask[part]
                row = part.stop
            stacks.append(
                Stack(list(stage.names), settings, shapes, Figures(), grids, masks, 0, 0, False)
            )
        return stacks

    def weights(self):
        return {name: self.layer.get_submodule(name).weight.data.clone()
                for name in self.architecture.linears()}  # fmt: skip

    def error(self, held=True, every=False):
        """Relative squared error over windows as they count, computed apart, in float64."""
        lost = whole = 0.0
        first, call = 0, self.course.call
        for chunk, size in enumerate(map(len, self.course.calibration.chunks())):
            x, y = (s.get(("hidden", chunk)) for s in (self.inputs, self.targets))
            each = self.mixture.of_windows(chunk)
            for at in range(size):
                window = x[at : at + 1].expand(self.course.windows, -1, -1)
                with torch.no_grad():
                    out = call.run(self.layer, window)[0].double()
                share = 1.0 if each is None else float(each[at])
                if every or ((first + at) % HELD_OUT == HELD_OUT - 1) == held:
                    lost += share * float((out - y[at].double()).square().mean())
                    whole += share * float(y[at].double().square().mean())
            first += size
        return lost / whole

    def train(self):
        return reconstruct(self.layer, self.stacks, self.course)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["cohere", "llama"])
def test_what_it_says_is_so_and_never_a_loss(tmp_path, short_steps, family, plan):
    """before and after are errors on the held-out windows; here training does find something."""
    case = Case(tmp_path, family, plan)
    before, others = case.error(), case.error(held=False)
    told = {k: float(v) for k, v in case.train().items()}
    # Chunks of 10 windows hold out one or two: what fills up a batch makes them count unequally.
    assert told["after"] <= told["before"]
    assert case.error() < before and case.error(held=False) < others
    for key, own in (("before", before), ("after", case.error())):
        assert told[key] == pytest.approx(own, rel=0.5)


def test_figures_of_whole_batches(tmp_path):
    """32 windows a chunk hold 4, one batch: nothing is filled up, so the figures are exact."""
    case = Case(tmp_path, windows=64, per_chunk=32)
    before = case.error()
    told = case.train()
    # Means of 1e3 squares each in float32, some 5 roundings deep by torch's tree of sums.
    assert float(told["before"]) == pytest.approx(before, rel=1e-4)
    assert float(told["after"]) == pytest.approx(case.error(), rel=1e-4)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["cohere", "llama"])
def test_masks_and_codes_stay(tmp_path, short_steps, family, plan):
    case = Case(tmp_path, family, plan)
    before = case.weights()
    grids = {name: copy.deepcopy(g) for s in case.stacks for name, g in s.grids.items()}
    masks = {name: m.clone() for s in case.stacks for name, m in (s.masks or {}).items()}
    case.train()
    for stack in case.stacks:
        for name in stack.names:
            now = case.layer.get_submodule(name).weight.data
            assert now.dtype == before[name].dtype and not torch.equal(now, before[name])
            if name in masks:
                assert torch.equal(stack.masks[name], masks[name])
                assert not now[~masks[name]].any()
            if name in grids:
                old, new = grids[name], stack.grids[name].check(name)
                assert torch.equal(old.codes, new.codes) and (old.zeros is None) == (
                    new.zeros is None
                )
                assert old.zeros is None or torch.equal(old.zeros, new.zeros)
                assert new.scales.dtype == old.scales.dtype
                assert bool(new.scales.isfinite().all()) and bool((new.scales > 0).all())
                assert torch.equal(now, new.dense(now.dtype))  # the file holds what was judged


@pytest.mark.parametrize("windows", [1, HELD_OUT - 1])
def test_nothing_is_trained_without_held_out_windows(tmp_path, windows):
    case = Case(tmp_path, windows=windows)
    before = case.weights()
    assert case.train() == {}
    assert all(torch.equal(W, before[name]) for name, W in case.weights().items())


def test_eight_windows_are_enough(tmp_path):
    assert Case(tmp_path, windows=HELD_OUT).train().keys() == {"before", "after"}


def test_steps_that_are_too_long_are_not_kept(tmp_path, monkeypatch):
    """Training that only does harm ends where it began, bit by bit."""
    monkeypatch.setattr(room, "STEP", 0.5)
    case = Case(tmp_path)
    before = case.weights()
    told = case.train()
    assert float(told["after"]) == float(told["before"])
    assert all(torch.equal(W, before[name]) for name, W in case.weights().items())


def test_held_out_windows_are_never_trained_on(tmp_path):
    """Other targets there change the choice at most: with these, both runs keep the last epoch."""
    case, other = (Case(tmp_path / str(i)) for i in range(2))
    first = 0
    for chunk, size in enumerate(map(len, other.course.calibration.chunks())):
        y = other.targets.get(("hidden", chunk)).clone()
        held = other.course.usable(slice(first, first + size), held=True)
        wanted = [at for at in range(size) if (first + at) % HELD_OUT == HELD_OUT - 1]
        assert held.tolist() == wanted
        y[held] *= 1.001
        other.targets.put(("hidden", chunk), y)
        first += size
    told = [c.train() for c in (case, other)]
    assert all(t["after"] < t["before"] for t in told)
    assert told[0]["before"] != told[1]["before"]
    a, b = case.weights(), other.weights()
    assert all(torch.equal(a[name], b[name]) for name in a)
    for epoch in range(2):
        places = list(case.course.places(0, False, epoch))
        for chunk, rows in places:
            numbers = rows + case.course.calibration.windows(chunk).start
            assert not (numbers % HELD_OUT == HELD_OUT - 1).any()
        seen = {(chunk, int(r)) for chunk, rows in places for r in rows}
        assert len(seen) == WINDOWS - WINDOWS // HELD_OUT  # and every other window is


@pytest.mark.parametrize("plan", ["half", "2:4+int4"])
def test_same_bits_again_and_for_two_threads(tmp_path, plan):
    before, found = torch.get_num_threads(), []
    try:
        for run, threads in enumerate((1, 1, 2)):
            torch.set_num_threads(threads)
            case = Case(tmp_path / str(run), plan=plan)
            case.train()
            found.append(case.weights())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in other)


def test_the_seed_chooses_the_order(tmp_path):
    a, b = (Case(tmp_path / str(seed), seed=seed) for seed in range(2))
    a.train(), b.train()
    assert any(not torch.equal(W, b.weights()[name]) for name, W in a.weights().items())
