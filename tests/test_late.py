"""Compression that never waits for the device inside a layer, shown on the CPU: the same code as on
a GPU runs with results looked at late, its calls are recorded, and its files are the same.
"""

import json
import threading
import time

import pytest
import syncs
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_compress import METHODS, recipe_of
from transformers import CohereConfig

from distaya_ext.compress import at_work, calibrate, compress, driver, events, ferry, layers
from distaya_ext.compress.ferry import Checks, Ferry
from distaya_ext.compress.settings import Settings
from distaya_ext.compress.solve import solve
from distaya_ext.compress.statistic import Statistic
from distaya_ext.compress.store import Store
from distaya_ext.errors import InputError
from distaya_ext.formats import Grid, ModuleScheme, bitmask, late
from distaya_ext.ops import obs

CPU = torch.device("cpu")
RECIPES = {key: {} for key in METHODS} | {
    "sparsegpt": {"bits": 4, "group": 32, "format": "distaya"},  # either encoding may be smaller
    "sparsegpt-joint": {"format": "distaya"},
    "gptq": {"format": "distaya", "symmetric": False, "embed_bits": 8},
    "magnitude": {"bits": 4, "group": 32, "format": "distaya"},
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Results are looked at late; every layer's calls are recorded."""
    monkeypatch.setattr(ferry, "runs_late", lambda device: True)
    found = []
    run = layers.Layers._layer

    def recorded(*arguments):
        with syncs.Recorder() as recorder:
            run(*arguments)
        found.append(recorder.found)

    monkeypatch.setattr(layers.Layers, "_layer", recorded)
    return found


def recipe(key):
    return recipe_of(key, **RECIPES[key])


def files(folder):
    """Bytes of all files, but for seconds, the pages that tell them, and the hashes of them."""
    timed = ("manifest.json", "report.html", "README.md")
    found = {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in timed}
    rows = found.pop("layers.csv").decode().splitlines()
    results = json.loads(found.pop("results.json"))
    results["totals"].pop("seconds")
    return found, [row.rpartition(",")[0] for row in rows], results


# ---- the recorder ----


def test_the_recorder_hears_what_would_wait():
    x = torch.arange(6.0).view(2, 3)
    calls = {
        "item": lambda: x[0, 0].item(),
        "bool": lambda: bool(x[0, 1] > 0),
        "int": lambda: int(x.sum()),
        "float": lambda: float(x.sum()),
        "if": lambda: 1 if (x > 0).any() else 0,
        "tolist": lambda: x.tolist(),
        "nonzero": lambda: x.nonzero(),
        "equal": lambda: torch.equal(x, x + 0),
        "mask": lambda: x[x > 2],
        "write by a mask": lambda: x.clone().__setitem__(x > 2, 0.0),
        "select": lambda: x.masked_select(x > 2),
        "cpu": lambda: x.cpu(),
        "to": lambda: x.to("cpu"),
        "numpy": lambda: x.numpy(),
        "place of a tensor": lambda: x[torch.tensor(1)],
        "constant": lambda: torch.tensor(2.0, device=x.device),
    }
    for name, call in calls.items():
        with syncs.Recorder() as recorder:
            call()
        assert recorder.found, name
    with syncs.Recorder() as recorder:
        (x @ x.T).add_(1).masked_fill(x @ x.T > 0, 1.0)[:, torch.tensor([1, 0])].to(torch.float64)
    assert recorder.found == []


@pytest.mark.parametrize(
    "reads", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0]]
)
def test_the_recorder_hears_into_our_ops(monkeypatch, reads):
    """What an op's own Python does is behind the dispatcher."""
    kernels = obs._C

    class Reads:
        def __getattr__(self, name):
            return getattr(kernels, name)

        def quantize(self, W, *arguments):
            reads(W)
            kernels.quantize(W, *arguments)

    W, quant = torch.randn(4, 64), obs.Quant(4, 32)
    with syncs.Recorder() as recorder:
        obs.quantize(W, quant)
    assert recorder.found == []
    monkeypatch.setattr(obs, "_C", Reads())
    with syncs.Recorder() as recorder:
        obs.quantize(W, quant)
    assert recorder.found


# ---- whole runs ----


@pytest.mark.parametrize("key", RECIPES)
def test_no_layer_waits_and_every_file_is_the_same(tmp_path, key, monkeypatch, request):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 5 * tiny.WINDOW)
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere"], dtype=torch.bfloat16)
    compress(source, tmp_path / "now", recipe(key), tiny.windows())
    found = request.getfixturevalue("as_on_a_gpu")
    told = []
    compress(source, tmp_path / "late", recipe(key), tiny.windows(), on_event=told.append)
    assert found == [[], []], "a layer read a value"
    assert files(tmp_path / "late") == files(tmp_path / "now")
    inside = [e for e in told if hasattr(e, "layer") and not isinstance(e, events.LanguagesDone)]
    starts = [(type(event).__name__, event.layer) for event in inside]
    stages = [("StageDone", 0)] * 3
    first = [("LayerStart", 0), *stages, ("LayerDone", 0)]
    assert starts == first + [(name, 1) for name, _ in first]


@pytest.mark.parametrize("family", ["llama-bias", "gemma2", "cohere2", "qwen3"])
def test_other_families_do_not_wait_either(tmp_path, family, monkeypatch, request):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 5 * tiny.WINDOW)
    source = tiny.make(tmp_path / "source", tiny.FAMILIES[family])
    skip = [r"layers\.0\.self_attn\.o_proj", r"layers\.1\.mlp"]
    joint = recipe_of("sparsegpt-joint", skip=skip)
    compress(source, tmp_path / "now", joint, tiny.windows())
    found = request.getfixturevalue("as_on_a_gpu")
    compress(source, tmp_path / "late", joint, tiny.windows())
    assert len(found) >= 2 and not any(found)
    assert files(tmp_path / "late") == files(tmp_path / "now")


@pytest.mark.parametrize("fields", [{"quality": "plain"}, {"method": "wanda"}], ids=str)
def test_weights_that_follow_the_losses_do_not_wait_either(tmp_path, fields, monkeypatch, request):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 5 * tiny.WINDOW)
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere"], dtype=torch.bfloat16)
    worst = tiny.recipe(calibration={"weights": "worst"}, **fields)
    compress(source, tmp_path / "now", worst, tiny.windows())
    found = request.getfixturevalue("as_on_a_gpu")
    compress(source, tmp_path / "late", worst, tiny.windows())
    assert found == [[], []], "a layer read a value"
    assert files(tmp_path / "late") == files(tmp_path / "now")


def test_a_planted_read_is_found(tmp_path, as_on_a_gpu, monkeypatch):
    check = calibrate.check_activations

    def reads(x, *arguments):
        x.amax().item()
        check(x, *arguments)

    monkeypatch.setattr(at_work, "check_activations", reads)
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere"])
    compress(source, tmp_path / "out", recipe("wanda"), tiny.windows())
    assert all("item" in found for found in as_on_a_gpu)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("activations", r"layers\.0\.self_attn\.q_proj .* language 'fr'"),
        ("weights", r"W\[5, 7\] of \[\d+, 64\] is inf, not finite"),
    ],
)
@pytest.mark.parametrize("in_time", [False, True])
def test_errors_are_the_same_sentences(tmp_path, what, words, in_time, request):
    if not in_time:
        request.getfixturevalue("as_on_a_gpu")
    config = CohereConfig(**{**tiny.FAMILIES["cohere"].to_dict(), "tie_word_embeddings": False})
    source = tiny.make(tmp_path / "source", config)
    path = source / "model.safetensors"
    tensors = load_file(path)
    if what == "activations":
        tensors["model.embed_tokens.weight"][5] = 3e38
    else:  # finite as stored, not in the dtype of the run
        tensors["model.layers.1.self_attn.q_proj.weight"][5, 7] = 1e5
        told = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(told | {"dtype": "float16"}))
    save_file(tensors, path, metadata={"format": "pt"})
    calibration = tiny.windows(8)
    calibration.ids[calibration.ids == 5] = 6
    if what == "activations":
        calibration.ids[5:8:2, 3] = 5  # two: in time, one would be left out
        with pytest.raises(InputError, match=words):
            compress(source, tmp_path / "out", recipe("sparsegpt-2:4"), calibration)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        return
    settings = Settings("sparsegpt", None, (2, 4), None, 128, False, "minmax", "natural", 0.01)
    W = tensors["model.layers.1.self_attn.q_proj.weight"].half()
    statistic = Statistic("hessian", W.shape[1], CPU)
    statistic.add(torch.randn(200, W.shape[1]))
    checks = Checks(late=not in_time)
    with pytest.raises(InputError, match=words):
        solve([W], settings, statistic, checks)
        ferry.judge(checks.take())


def test_a_singular_hessian_and_unranked_scores_are_told_late():
    W = torch.randn(8, 16)
    for method, kind, words in [
        ("sparsegpt", "hessian", "H .16 x 16. is not finite: .* input 3"),
        ("wanda", "norms", "scores .8, 16. is NaN at row 0, column 3: it has no rank"),
    ]:
        settings = Settings(method, 0.5, None, None, 128, False, "minmax", "natural", 0.01)
        statistic = Statistic(kind, 16, CPU)
        x = torch.randn(64, 16)
        x[4, 3] = torch.nan
        statistic.add(x)
        checks = Checks(late=True)
        solve([W], settings, statistic, checks)
        with pytest.raises(ValueError, match=words):
            ferry.judge(checks.take())


@pytest.mark.cuda
@pytest.mark.parametrize(
    "key", ["sparsegpt-joint", "sparsegpt", "wanda", "gptq", "gptq-activation"]
)
def test_on_a_gpu_torch_itself_finds_no_wait(tmp_path, key, monkeypatch):
    """And what comes home is what the same kernels give when every result is looked at at once."""
    source = tiny.make(tmp_path / "source", tiny.FAMILIES["cohere"], dtype=torch.bfloat16)
    monkeypatch.setattr(calibrate, "CUDA_CHUNK_TOKENS", 5 * tiny.WINDOW)
    monkeypatch.setattr(driver, "CUDA_CHUNK_TOKENS", 5 * tiny.WINDOW)
    run = layers.Layers._layer

    def strict(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(layers.Layers, "_layer", strict)
    compress(source, tmp_path / "late", recipe(key), tiny.windows(), device="cuda")
    monkeypatch.setattr(layers.Layers, "_layer", run)
    monkeypatch.setattr(Ferry, "do", lambda self, job, then=lambda _: None: then(job()))
    compress(source, tmp_path / "now", recipe(key), tiny.windows(), device="cuda")
    assert files(tmp_path / "late") == files(tmp_path / "now")


# ---- the ferry ----


def test_the_next_read_is_under_way_and_no_more(monkeypatch):
    monkeypatch.setattr(ferry, "runs_late", lambda device: True)
    begun = []

    def read(index):
        begun.append((index, threading.current_thread() is threading.main_thread()))
        return {"x": torch.tensor([index])}

    with Ferry(CPU) as way:
        coming = way.ahead((lambda i=i: read(i)) for i in range(5))
        for index in range(5):
            assert int(next(coming)["x"]) == index
            time.sleep(0.02)
            assert begun == [(i, False) for i in range(min(index + 2, 5))]


def test_jobs_keep_their_order_and_the_host_is_one_turn_ahead(monkeypatch):
    monkeypatch.setattr(ferry, "runs_late", lambda device: True)
    gate, told = threading.Event(), []
    with Ferry(CPU) as way:
        way.do(gate.wait)
        way.do(lambda: 1, told.append)
        way.turn()  # queued just now: nothing is waited for
        assert told == []
        way.do(lambda: 2, told.append)
        gate.set()
        way.turn()
        assert told == [1]
        way.land()
        assert told == [1, 2]

        def fails():
            raise InputError("a sentence")

        way.do(fails, told.append)
        with pytest.raises(InputError, match="a sentence"):
            way.land()
    assert told == [1, 2]


def test_on_the_cpu_everything_happens_in_place():
    told = []
    with Ferry(CPU) as way:
        assert not way.late
        way.do(lambda: threading.current_thread(), told.append)
    assert told == [threading.main_thread()]


def test_a_store_on_the_host_changes_no_bit():
    store, x = Store(host=True), torch.randn(3, 4)
    store.put("x", (x, None))
    back, none = store.get("x")
    assert store.spills and none is None and torch.equal(back, x) and back is not x


# ---- encoding ----


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("encoding", ["bitmask", "pack-quantized"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 13), (7, 96), (64, 130)])
def test_late_encoding_gives_the_same_bytes(rows, cols, encoding, symmetric, monkeypatch):
    monkeypatch.setattr(late, "_BLOCK", 100)  # several blocks, whose counts add up
    make = torch.Generator().manual_seed(rows * cols)
    codes = torch.randint(0, 16, (rows, cols), generator=make).to(torch.uint8)
    zeros = torch.randint(0, 16, (rows, -(-cols // 32)), generator=make).to(torch.uint8)
    grid = Grid(codes, torch.rand(zeros.shape, generator=make).bfloat16(), zeros, 4, 32)
    codes[torch.rand(rows, cols, generator=make) < 0.5] = 0
    if symmetric:
        grid = Grid(torch.where(codes == 0, 8, codes).to(torch.uint8), grid.scales, None, 4, 32)
    scheme = ModuleScheme(4, 32, symmetric, encoding)
    with syncs.Recorder() as recorder:
        begun = late.start(scheme, grid)
    assert recorder.found == []
    done, exact = late.finish(scheme, begun), scheme.encode(grid)
    assert done.keys() == exact.keys()
    assert all(torch.equal(done[suffix], exact[suffix]) for suffix in exact)
    if encoding == "bitmask":
        assert late.kept(begun) == int(grid.kept().sum())
        assert set(bitmask.needs(scheme, rows, cols, torch.bfloat16)) == set(done)


@pytest.mark.parametrize("what", ["codes", "zeros", "nan", "negative"])
def test_late_encoding_refuses_with_the_same_sentence(what):
    grid = Grid(
        torch.ones(4, 64, dtype=torch.uint8), torch.ones(4, 2),
        torch.ones(4, 2, dtype=torch.uint8), 4, 32,
    )  # fmt: skip
    spoilt = {"codes": grid.codes, "zeros": grid.zeros}.get(what, grid.scales)
    spoilt[2, 1] = {"nan": torch.nan, "negative": -1.0}.get(what, 16)
    scheme = ModuleScheme(4, 32, False, "bitmask")
    with pytest.raises(InputError) as now:
        scheme.encode(grid)
    begun = late.start(scheme, grid)
    with pytest.raises(InputError) as then:
        late.finish(scheme, begun)
    assert str(then.value) == str(now.value) and "row 2" in str(now.value)
