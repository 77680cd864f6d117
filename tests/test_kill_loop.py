"""A compression that is killed again and again ends with the hashes of one that never was."""

import random
import time

import forked
import pytest
import tiny

MODELS = {"llama": tiny.FAMILIES["llama"], "cohere2": tiny.FAMILIES["cohere2"]}
RECIPES = {
    "sparsegpt": {"model": "llama", "recipe": {"method": "sparsegpt", "quality": "plain"}},
    "quantised": {
        "model": "cohere2",
        "recipe": {
            "method": "sparsegpt", "nm": "2:4", "bits": 4, "group": 32, "embed_bits": 8,
            "quality": "default",
        },
    },
    "worst": {
        "model": "llama",
        "recipe": {"method": "sparsegpt", "calibration": {"weights": "worst"}},
    },
    "magnitude": {"model": "llama", "recipe": {"method": "magnitude"}, "windows": 0},
}  # fmt: skip


class Case:
    """A recipe, its models' folder and what an uninterrupted run of it wrote."""

    def __init__(self, forks, folder, name):
        case = RECIPES[name]
        self.forks, self.folder, self.name = forks, folder, name
        self.order = {
            "source": folder / case["model"],
            "recipe": case["recipe"],
            "windows": case.get("windows", 12),
            "length": tiny.WINDOW,
        }
        whole = self.run("whole")
        assert whole["code"] == 0, whole
        self.hashes = forked.hashes(self.out("whole"))
        self.seconds = whole["seconds"]

    def out(self, name):
        return self.folder / f"{self.name}-{name}"

    def run(self, name, **more):
        return self.forks.run(out=self.out(name), **{**self.order, **more})

    def over(self, told):
        """Whether a run ended: it wrote the output, or one before was killed with nothing left."""
        return told["code"] == 0 or (told["code"] == 3 and "is not empty" in told["sentence"])

    def check(self, name):
        assert forked.hashes(self.out(name)) == self.hashes
        assert forked.beside(self.out(name)) == [self.out(name).name], "something is left"


@pytest.fixture(scope="module")
def case_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    for name, config in MODELS.items():
        tiny.make(folder / name, config)
    forks = forked.Forks(folder / "answers")
    for name in MODELS:
        forks.run(warm=True, source=folder / name, out=folder / "warm")
    cases = {}

    def of(name):
        if name not in cases:
            cases[name] = Case(forks, folder, name)
        return cases[name]

    yield of
    forks.close()


@pytest.mark.parametrize("name", ["quantised", "magnitude"])
def test_killed_at_every_durable_operation(case_of, name):
    """The command is killed at its first operation, then again at its second, and so on; when a
    layer or a shard more is in the journal, from the first one behind it.
    """
    case, at, kills = case_of(name), 1, 0
    begin = time.perf_counter()
    while True:
        before = forked.commits(case.out("ops"))
        told = case.run("ops", op=at, share=1e9)
        if case.over(told):
            break
        assert told["code"] == forked.KILLED, told
        kills += 1
        at = 1 if forked.commits(case.out("ops")) > before else at + 1
        assert kills < 200, "it does not get on"
    case.check("ops")
    print(f"{name}: {kills} kills in {time.perf_counter() - begin:.1f} s")
    assert kills >= 50, kills


@pytest.mark.parametrize("name", RECIPES)
def test_killed_at_random_moments(case_of, name):
    case, kills, ends = case_of(name), 0, 0
    moments = random.Random(f"moments of {name}")
    begin = time.perf_counter()
    while kills < 15:
        told = case.run(f"r{ends}", after=moments.uniform(0, case.seconds))
        if case.over(told):
            case.check(f"r{ends}")
            ends += 1
        else:
            assert told["code"] == forked.KILLED, told
            kills += 1
    told = case.run(f"r{ends}")
    assert case.over(told), told
    case.check(f"r{ends}")
    print(f"{name}: {kills} kills, {ends + 1} ends in {time.perf_counter() - begin:.1f} s")
