"""What every fuzz target is made of: bytes as decisions, documents edited by them, and a guard.

A target takes one byte string, damages one of our inputs by it and reads that the way users do. The
guard holds it to the contract: an error of ours or success, in bounded time and memory, and nothing
written. The same targets serve hypothesis, the kept corpus and tools/fuzz.py.
"""

import copy
import json
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distaya_ext.errors import DistayaError

CORPUS = Path(__file__).with_name("corpus")
SECONDS = 20  # a reader of a few kB that needs longer hangs; the machine may be busy
MEMORY = 400 << 20  # bytes that one input may add to the most this process ever held
SENTENCE = 17_000  # characters of the longest error; names of tensors and files are in it


class Broken(AssertionError):
    """The contract is broken."""


class Dice:
    """Bytes read one after the other; when they are used up every decision is the first choice."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def below(self, count: int) -> int:
        """A number from 0 to count - 1."""
        wide = self.byte() if count <= 256 else int.from_bytes(self.take(4).ljust(4, b"\0"), "big")
        return wide % max(1, count)

    def choose(self, among: Any) -> Any:
        return among[self.below(len(among))]

    def take(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def rest(self) -> bytes:
        return self.take(max(0, len(self.data) - self.at))

    @property
    def left(self) -> bool:
        return self.at < len(self.data)


def _deep(levels: int) -> list:
    found: list = []
    for _ in range(levels):
        found = [found]
    return found


ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 16, 255, 1 << 15, 1 << 31, (1 << 31) - 1, 1 << 40, 1 << 53,
    1 << 63, -(1 << 63), 1 << 70, 10**400, 0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, float("inf"),
    float("nan"), "", " ", ".", "..", "../x", "/x", "a/b", "x\0y", "x" * 300, "x" * 5000, "\ud800",
    "é", "0", "nan", "1e9", "re:(a+)+$", "re:.*", "re:(", "float16", "bfloat16", "int4", "F8_E4M3",
    "BF16", "I64", "gptq", "distaya", "sdpa", "owner/name", "model.safetensors", "config.json",
    [], {}, [[]], [None], [0], [1, 2], ["x"], {"": 0}, {"x": {}}, [0] * 200, _deep(60),
]  # fmt: skip

KEYS = [  # that mean something to transformers, PEFT, tokenizers or us
    "auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "dtype",
    "torch_dtype", "quantization_config", "compression_config", "rope_scaling", "rope_parameters",
    "rope_theta", "layer_types", "sliding_window", "sliding_window_pattern", "head_dim", "metadata",
    "tie_word_embeddings", "text_config", "sub_configs", "per_layer_config", "architectures",
    "transformers_version", "use_kernels", "id2label", "num_labels", "output_attentions", "name",
    "hidden_act", "hidden_activation", "final_logit_softcapping", "query_pre_attn_scalar", "bias",
    "attention_bias", "mlp_bias", "use_qk_norm", "use_dora", "layers_pattern", "target_parameters",
    "tokenizer_class", "added_tokens_decoder", "extra_special_tokens", "chat_template", "vocab",
    "tokenizer_file", "model_max_length", "padding_side", "backend", "normalizer", "post_processor",
    "pre_tokenizer", "decoder", "model", "type", "__metadata__", "weight_map", "config_groups",
]  # fmt: skip


def edited(document: Any, dice: Dice) -> Any:
    """A copy of a JSON document with up to six changes anywhere in it."""
    root = [copy.deepcopy(document)]
    for _ in range(1 + dice.below(6)):
        place, key = dice.choose(list(_places(root)))
        if isinstance(key, int) and key >= len(place):
            continue
        _change(place, key, dice, root)
        if not dice.left or not root:
            break
    return root[0] if root else None


def _change(place: Any, key: Any, dice: Dice, root: list) -> None:
    what = dice.below(8)
    if what <= 2:
        place[key] = copy.deepcopy(dice.choose(ODD))
    elif what == 3:
        place[key] = int.from_bytes(dice.take(4), "little", signed=True)
    elif what == 4 and place is not root:
        del place[key]
    elif what == 5:
        other, name = dice.choose(list(_places(root)))
        place[key] = copy.deepcopy(other[name])
    elif what == 6:
        place[key] = [place[key]]
    elif isinstance(place, dict):
        any_name = dice.take(1 + dice.below(12)).decode("latin-1")
        name = any_name if dice.byte() % 2 else dice.choose(KEYS)
        place[name] = copy.deepcopy(dice.choose(ODD))
    elif place is not root:
        place.append(copy.deepcopy(dice.choose(ODD)))


def _places(root: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value, the first 400 of a list only."""
    stack = [root]
    while stack:
        held = stack.pop()
        for key in list(held) if isinstance(held, dict) else range(min(400, len(held))):
            yield held, key
            if isinstance(held[key], (dict, list)):
                stack.append(held[key])


def as_json(document: Any) -> bytes:
    """JSON text of a document with anything in it; half a surrogate pair stays an escape."""
    return json.dumps(document).encode()


def spliced(text: bytes, dice: Dice, tokens: tuple[bytes, ...] = ()) -> bytes:
    """Text with up to eight pieces of it replaced by tokens, by bytes, or by another piece."""
    for _ in range(1 + dice.below(8)):
        start = dice.below(len(text) + 1)
        end = min(len(text), start + dice.below(17))
        what = dice.below(4)
        if what == 0 and tokens:
            new = dice.choose(tokens)
        elif what == 1:
            new = dice.take(1 + dice.below(8))
        elif what == 2:
            new = text[(at := dice.below(len(text) + 1)) : at + dice.below(40)]
        else:
            new = bytes([dice.byte()]) * (1 + dice.below(3))
        text = text[:start] + new + text[end:]
        if not dice.left:
            break
    return text


def json_file(document: Any, dice: Dice) -> bytes:
    """A JSON file: the document with changes, its text with changes, or anything at all."""
    way = dice.below(8)
    if way == 7:
        return dice.rest()
    if way == 6:
        return spliced(as_json(document), dice, (b"{", b"}", b'"', b",", b"[", b"1e999", b"\\u"))
    return as_json(edited(document, dice))


def flipped(data: bytes, dice: Dice, most: int = 8) -> bytes:
    """A copy with a few bytes changed, perhaps cut off or longer."""
    found = bytearray(data)
    for _ in range(1 + dice.below(most)):
        if found:
            found[dice.below(len(found))] = dice.byte()
    end = dice.below(6)
    if end == 4:
        return bytes(found[: dice.below(len(found) + 1)])
    return bytes(found) + (dice.take(8) if end == 5 else b"")


@contextmanager
def guarded(*folders: Path) -> Iterator[None]:
    """Hold what happens inside to the contract; an error of ours is an end as good as any."""
    before = [_listing(folder) for folder in folders]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    try:
        yield
    except DistayaError as error:
        sentence = str(error)
        if not sentence.isprintable() or not 8 <= len(sentence) <= SENTENCE:
            raise Broken(f"no sentence: {sentence[:2000]!r}") from error
    taken = time.monotonic() - start
    if taken > SECONDS:
        raise Broken(f"{taken:.0f} seconds")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) << 10
    if grown > MEMORY:
        raise Broken(f"{grown >> 20} MiB more memory")
    if [_listing(folder) for folder in folders] != before:
        raise Broken("a reader wrote something")


def _listing(folder: Path) -> list[tuple]:
    found = []
    for path, _, names in os.walk(folder):
        for name in names:
            about = os.lstat(os.path.join(path, name))
            found.append((path, name, about.st_size, about.st_mtime_ns))
    return sorted(found)


def kept(name: str) -> list[bytes]:
    """The corpus of a target: tests/corpus/NAME.txt, a line of hexadecimal per input."""
    path = CORPUS / f"{name}.txt"
    lines = path.read_text(encoding="ascii").splitlines() if path.is_file() else []
    return [bytes.fromhex(line) for line in lines if not line.startswith("#")]


class Target:
    """One reader under fuzz. prepare(folder) makes what it needs once; run(data) is one input."""

    def __init__(
        self,
        name: str,
        prepare: Callable[[Path], Any],
        run: Callable[[Any, Dice], None],
        slow: int = 1,
    ):
        self.name, self._prepare, self._run = name, prepare, run
        self.slow = slow  # how many times fewer inputs a test can afford
        self.state: Any = None

    def prepare(self, folder: Path) -> "Target":
        self.state = self._prepare(folder)
        return self

    def run(self, data: bytes) -> None:
        """Broken, or whatever else escaped, when the contract does not hold for this input."""
        self._run(self.state, Dice(data))


def found_within(target: Target, runs: int) -> bool:
    """Whether plain random bytes break the contract in so many runs."""
    rng = random.Random(5)
    for _ in range(runs):
        data = bytes(rng.choice([rng.randrange(256), rng.randrange(8)]) for _ in range(40))
        try:
            target.run(data)
        except Exception:
            return True
    return False
