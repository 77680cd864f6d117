"""plan(): what it says of a run beside what the run then writes, and what it refuses."""

import json
import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors import safe_open

from distaya_ext.checkpoint import open_checkpoint
from distaya_ext.compress import budget, calibrate, compress, phases
from distaya_ext.compress.packing import Packing
from distaya_ext.compress.plan import make_plan
from distaya_ext.errors import ResourceError, UsageError
from distaya_ext.planning import fits, parts, plan, probe, ranks, times
from distaya_ext.planning.clock import Rehearsal

PROCESS = 400 << 20
REHEARSED = Rehearsal(0, 200, 2.0, 1.0, 0.001, 0.0001, 0.5, 2, 1e-6, 1e-9)


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """What the process that rehearses would say; the requests it got."""
    requests = []

    def ask(request):
        requests.append(request)
        found = {"process": PROCESS, "startup": 1.0}
        return found | ({"rehearsal": vars(REHEARSED)} if request["rehearse"] else {})

    monkeypatch.setattr(probe, "ask", ask)
    return requests


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("source") / "llama", tiny.FAMILIES["llama"])


def held(folder):
    """Bytes of all tensors of a model folder by the name of their module."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                found[name] = tensor.nbytes
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "magnitude", "nm": "2:4"},
        {"method": "rtn", "bits": 4, "group": 32},
        {"method": "rtn", "bits": 4, "group": 32, "embed_bits": 8},
        {"method": "rtn", "bits": 8, "group": 32, "skip": ["mlp"]},
        {"method": "dense", "drop_layers": [1], "embed_bits": 8},
    ],
    ids=str,
)
def test_bytes_of_every_part_are_those_of_the_files(tmp_path, source, fields):
    recipe = tiny.recipe(**fields)
    found = plan(source, recipe)
    compress(source, tmp_path / "out", recipe)
    real = held(tmp_path / "out")
    sums = dict.fromkeys(parts.PARTS, 0)
    for name, size in real.items():
        kind = "other"
        for word, part in (("embed", "embedding"), ("lm_head", "head"), ("norm", "norms"),
                           (".mlp.", "mlp"), ("self_attn", "attention")):  # fmt: skip
            if word in name:
                kind = part
                break
        sums[kind] += size
    assert {name: part.bytes for name, part in found.parts.items()} == {
        name: size for name, size in sums.items() if size
    }
    files = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert abs(found.output - files) <= 0.01 * files  # the header's padding
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found.output == report["size"]["predicted_bytes"]


def test_bits_per_weight_with_and_without_the_embedding(source):
    found = plan(source, tiny.recipe("rtn", bits=8, group=0))
    inner = [found.parts[name] for name in ("attention", "mlp")]
    assert found.bits_per_weight_layers == 8 * sum(p.bytes for p in inner) / sum(
        p.weights for p in inner
    )
    assert 8 < found.bits_per_weight_layers < 9 < found.bits_per_weight < 32  # float32 embeddings


def test_nothing_is_written(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(source.iterdir())
    plan(source, tiny.recipe(), tiny.windows(), out=tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == [] and sorted(source.iterdir()) == before


# ---- memory ----


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_family_is_counted(tmp_path, family):
    source = tiny.make(tmp_path / "source", tiny.FAMILIES[family])
    found = plan(source, tiny.recipe(nm="2:4", bits=4, group=32), tiny.windows())
    layer = max(size for name, size in found.memory.phases.items() if name.startswith("layer"))
    weights = phases.layer_bytes(open_checkpoint(source))
    assert weights < layer < 40 * weights
    assert found.memory.peak == PROCESS + max(found.memory.phases.values())


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "wanda"},
        {"method": "magnitude"},
        {"method": "ria", "nm": "2:4"},
        {"method": "dass"},
        {"method": "dass", "nm": "2:4", "dass": {"permute": True, "update": True}},
        {"method": "gptq", "bits": 3, "group": 32, "order": "activation"},
        {"method": "sparsegpt", "nm": "2:4", "permute": True},
        {"method": "sparsegpt", "quality": "plain", "calibration": {"weights": "worst"}},
        {"method": "sparsegpt", "nm": "2:4", "bits": 4, "group": 32, "quality": "high"},
    ],
    ids=str,
)
def test_every_method_is_counted(source, fields):
    """Also what a run refuses in its layers is refused."""
    found = plan(source, tiny.recipe(**fields), tiny.windows())
    more = plan(source, tiny.recipe(**fields), tiny.windows(48))
    assert found.memory.phases and found.memory.peak > PROCESS
    learns = fields["method"] != "magnitude"
    assert (more.memory.peak > found.memory.peak) is learns


def test_more_chunks_than_are_run_cost_what_the_third_added(source, monkeypatch):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 4 * tiny.WINDOW)
    whole = plan(source, tiny.recipe(), tiny.windows(24)).memory.phases
    monkeypatch.setattr(phases, "_CHUNKS", 100)
    exact = plan(source, tiny.recipe(), tiny.windows(24)).memory.phases
    for name, size in exact.items():
        assert whole[name] == pytest.approx(size, rel=0.06), name


def test_spilled_activations_are_not_in_memory(source, monkeypatch):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 4 * tiny.WINDOW)
    here = plan(source, tiny.recipe(), tiny.windows(200))
    monkeypatch.setattr(budget.Budget, "spills", lambda self, size: True)
    away = plan(source, tiny.recipe(), tiny.windows(200))
    assert away.memory.spilled and not here.memory.spilled
    assert max(away.memory.phases.values()) < 0.5 * max(here.memory.phases.values())
    assert away.disk["spilled activations"] > 0 == here.disk["spilled activations"]


# ---- refusals ----


def test_what_compress_refuses_is_refused_in_the_same_words(tmp_path, source):
    cases = [
        (tiny.recipe(), None),
        (tiny.recipe(max_ram="100MiB"), tiny.windows()),
        (tiny.recipe(skip=["nothing_like_it"]), tiny.windows()),
        (tiny.recipe(bits=4, group=64, format="pack-quantized"), tiny.windows()),
        (tiny.recipe(drop_layers=[9]), tiny.windows()),
        (tiny.recipe(nm="3:5"), tiny.windows()),
        (tiny.recipe(), SimpleNamespace(ids=torch.full((4, 8), 97), languages=["en"] * 4)),
    ]
    for number, (recipe, texts) in enumerate(cases):
        with pytest.raises(ValueError) as run:
            compress(source, tmp_path / f"out{number}", recipe, texts)
        with pytest.raises(ValueError) as planned:
            plan(source, recipe, texts)
        assert str(planned.value) == str(run.value) and type(planned.value) is type(run.value)


def test_a_run_that_does_not_fit_is_told_with_what_would(source, monkeypatch):
    for module in (fits, budget):
        monkeypatch.setattr(module, "physical_bytes", lambda: PROCESS + 1)
    with pytest.raises(ResourceError) as refused:
        plan(source, tiny.recipe(), tiny.windows())
    assert f"this machine has {PROCESS / 2**30:.2f} GiB" in str(refused.value)
    monkeypatch.undo()
    big = {"process": 600 << 20, "startup": 1.0}
    monkeypatch.setattr(probe, "ask", lambda request: big)
    few = {"rehearse": False, "max_ram": "600MiB"}
    with pytest.raises(ResourceError) as refused:
        plan(source, tiny.recipe(), tiny.windows(), **few)
    told = str(refused.value)
    assert "at its peak (" in told and "max_ram allows 0.59 GiB" in told
    least = re.search(r"--max-ram ([0-9.]+GiB) is the least that suffices", told)
    plan(source, tiny.recipe(), tiny.windows(), **{**few, "max_ram": least[1]})


def test_the_limit_and_the_tokens_that_are_proposed_do_suffice(source, monkeypatch):
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 4 * tiny.WINDOW)
    texts = tiny.windows(800)
    checkpoint = open_checkpoint(source)
    recipe = tiny.recipe()
    chosen = make_plan(recipe, checkpoint, 3)
    packing = Packing(recipe, chosen, checkpoint)
    needs = budget.needs_of(recipe, chosen, checkpoint)
    job = phases.Job(checkpoint, packing.plan, packing, needs, texts)
    least = fits.least_limit(job, 600 << 20)
    assert plan(source, tiny.recipe(max_ram=f"{least}B"), texts).memory.peak <= least
    held = phases.memory(job, budget.Budget(checkpoint, 1 << 30, needs), 0).peak
    there = (1 << 30) - 1
    process = there + 1 - held
    tokens = fits.most_tokens(job, process, there)
    assert 0 < tokens < texts.tokens and tokens % (4 * tiny.WINDOW) == 0
    few = job.with_chunks(tokens // (4 * tiny.WINDOW))
    assert phases.memory(few, budget.Budget(checkpoint, there, needs), process).peak <= there


def test_a_full_disk_is_told_before_the_run(source, monkeypatch):
    needed = sum(plan(source, tiny.recipe(), tiny.windows()).disk.values())
    usage = {"free": needed}
    monkeypatch.setattr(fits.shutil, "disk_usage", lambda path: SimpleNamespace(**usage))
    plan(source, tiny.recipe(), tiny.windows())
    usage["free"] -= 1
    with pytest.raises(ResourceError, match=r"writes .* GiB free|writes .* are free there"):
        plan(source, tiny.recipe(), tiny.windows())


def test_a_gpu_that_is_not_here_is_counted_under_a_limit(source):
    found = plan(source, tiny.recipe(), tiny.windows(), device="cuda", max_vram="16GiB")
    assert not found.away and found.to_dict()["vram"]["kind"] == "counted, not measured"
    with pytest.raises(ResourceError, match=r"needs|takes at least .* max_vram allows 0\.5 GiB"):
        plan(source, tiny.recipe(), tiny.windows(), device="cuda", max_vram="512MiB")
    with pytest.raises(UsageError, match="needs --device cuda"):
        plan(source, tiny.recipe(), tiny.windows(), max_vram="512MiB")


# ---- doubts ----


def test_matrices_with_fewer_tokens_than_columns_are_named(source):
    found = plan(source, tiny.recipe(), tiny.windows(3)).ranks  # 72 tokens, 64 and 96 columns
    missing = {rank.module: rank.missing for rank in found}
    assert missing["mlp.down_proj"] == 96 - 72 and missing["self_attn.q_proj"] == 0
    down = next(rank for rank in found if rank.module == "mlp.down_proj")
    assert down.matrices == 3 and "24 directions are decided by damping alone" in down.sentence
    assert plan(source, tiny.recipe(), tiny.windows(16)).ranks == []
    assert plan(source, tiny.recipe("wanda"), tiny.windows(3)).ranks == []
    assert ranks.FEW == 4


def test_rivals_take_no_more_and_keep_more(source):
    recipe = tiny.recipe("sparsegpt", sparsity=0.5, bits=8, group=32)
    found = plan(source, recipe, tiny.windows())
    assert found.rivals
    for rival in found.rivals:
        assert rival.bytes <= 1.03 * found.output
        assert rival.kept > 0.5 or rival.bits > 8
    assert plan(source, tiny.recipe("dense", embed_bits=8)).rivals == []


# ---- time ----


def test_time_follows_tokens_layers_and_settings(source):
    def seconds(count, **fields):
        return plan(source, tiny.recipe(**fields), tiny.windows(count)).time

    few, many = seconds(10), seconds(1010)
    assert many.steps["layers"] - few.steps["layers"] == pytest.approx(3 * 0.001 * 24000)
    assert 0 < few.low < few.seconds < few.high
    skipping = seconds(10, skip=[r"layers\.[12]\."])
    assert skipping.steps["layers"] < few.steps["layers"]
    assert "layer" in few.based_on
    assert plan(source, tiny.recipe(), tiny.windows(), rehearse=False).time is None


def test_a_layer_that_is_not_changed_takes_only_its_tokens(source):
    recipe = tiny.recipe(skip=[r"layers\.1\."])
    checkpoint = open_checkpoint(source)
    chosen = make_plan(recipe, checkpoint, 3)
    assert times.layer_work(checkpoint, chosen, 1) == 0 < times.layer_work(checkpoint, chosen, 2)


def test_the_plan_is_plain_json(source):
    found = plan(source, tiny.recipe(nm="2:4", bits=4, group=32), tiny.windows())
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert {
        "schema", "model", "recipe", "device", "tokens", "layers", "format", "ram", "vram", "disk",
        "output", "ranks", "rivals", "time", "scaling", "notices",
    } == told.keys()  # fmt: skip
    assert told["ram"]["peak"] == max(told["ram"]["phases"].values())
    assert told["disk"]["peak"] == sum(v for k, v in told["disk"].items() if k != "peak")
