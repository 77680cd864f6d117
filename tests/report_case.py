"""A folder of ours by hand: all the files a report reads, with numbers that are easy to find."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

from distaya_ext.checkpoint import MARKER

KINDS = ("q_proj", "k_proj", "down_proj")
LOST = {"sw": 0.30, "ja": 0.20, "ar": 0.12, "en": 0.05}
VOID = {"meta", "link", "br", "img", "input", "hr", "!doctype"}


def results(**fields):
    modules, weights = 6, 6 * 64 * 64
    return {
        "versions": {"distaya_ext": "0.1.0", "torch": "2.13.0"},
        "machine": {"cpu": "A Processor", "cores": 2},
        "method": "sparsegpt",
        "quality": "plain",
        "model_type": "cohere",
        "dropped_layers": [],
        "calibration": {
            "tokens": 4096,
            "window": 64,
            "tokens_per_language": dict.fromkeys(LOST, 1024),
            "weights": {"sw": 2.0, "ja": 1.0, "ar": 1.0, "en": 1.0},
            "languages": {
                lang: {
                    "windows": 16,
                    "tokens": 1024,
                    "fertility": 0.4,
                    "bytes_per_token": 2.5,
                    "share": [0.25, 0.25],
                    "error": [lost / 10, lost / 5],
                }
                for lang, lost in LOST.items()
            },
        },
        "totals": {
            "modules": modules,
            "weights": weights,
            "zeros": weights // 2,
            "sparsity": 0.5,
            "loss": 12.5,
            "bytes": weights // 2,
            "bits_per_weight": 4.0,
            "floored": 0,
            "dead": 0,
            "seconds": 75.0,
        },
        "size": {
            "format": "pack-quantized",
            "predicted_bytes": weights // 2 + 16384,
            "file_bytes": weights // 2 + 16384 + 100,
            "ends": {
                "model.embed_tokens": {
                    "shape": "128x64",
                    "bits": 16,
                    "bytes": 16384,
                    "bits_per_weight": 16.0,
                }
            },
        },
        "notices": ["something was odd in /srv/private/texts/sw.txt"],
        "fallbacks": {
            "kinds": {"pivot_floor": 2, "rank_zero": 1},
            "modules": [
                {
                    "module": "model.layers.1.mlp.down_proj",
                    "kind": "rank_zero",
                    "count": 64,
                    "what": "none of 64 inputs active",
                    "degraded": True,
                }
            ],
            "degraded": 1,
            "of": modules,
        },
    } | fields


def evaluation(**fields):
    rows = [
        {
            "language": lang,
            "samples": 20,
            "tokens": 1000,
            "nll": 3.0 + lost,
            "ppl": 20.0,
            "bits_per_byte": 1.5,
            "base_nll": 3.0,
            "base_bits_per_byte": 1.4,
            "dnll": lost,
            "dnll_interval": [lost - 0.04, lost + 0.04],
            "ppl_ratio": 2.718281828**lost,
            "kl": 0.1,
            "kl_p99": 1.25,
            "agreement": 0.9,
            "wrong_script": 0.031,
            "base_wrong_script": 0.0,
        }
        for lang, lost in LOST.items()
    ]
    samples = [
        {"language": "en", "prompt": "The cat", "base": " sat on a mat", "model": " sat on it"},
        {"language": "ar", "prompt": "هذه المكتبة", "base": " مفيدة جدا", "model": " مفيدة"},
        {"language": "sw", "prompt": "Paka", "base": " ameketi", "model": " paka"},
    ]
    return {
        "model": "compress",
        "base": "CohereLabs/aya",
        "mode": "lines",
        "nll": 3.17,
        "base_nll": 3.0,
        "dnll": 0.17,
        "gap": 0.14,
        "languages": rows,
        "samples": samples,
        "seconds": 3.0,
        "notes": ["Perplexity is not everything."],
    } | fields


def speed(**fields):
    row = {"threads": 1, "prompt": 64, "new": 16, "contended": False, "graph_rate": None}
    return {
        "version": 1,
        "bench": "model",
        "machine": {"cpu": "A Processor", "cores": 2},
        "read": 10.0,
        "in_cache": False,
        "ratios": {"prefill": 0.9, "decode": 2.0, "bytes": 0.25},
        "rows": [
            {**row, "name": "small", "weights": "int4-2:4", "nbytes": 1 << 20}
            | {"prefill_rate": 900.0, "decode_rate": 200.0},
            {**row, "name": "dense", "weights": "bfloat16", "nbytes": 4 << 20}
            | {"prefill_rate": 1000.0, "decode_rate": 100.0},
        ],
    } | fields


def training():
    each = {"labels": 100, "nll": 3.4, "kl": 0.3}
    return {
        "spec": {"train": "scales"},
        "texts": {"windows": 10},
        "course": {
            "steps": 3,
            "best_step": 3,
            "best_loss": 0.21,
            "held_out": [[0, 0.4], [3, 0.21]],
            "tokens": 1000,
            "seconds": 9.0,
            "tokens_per_second": 111.1,
            "parameters": 640,
        },
        "before": {"en": each, "all": each},
        "after": {"en": each | {"nll": 3.1}, "all": each | {"nll": 3.1}},
        "versions": {"torch": "2.13.0"},
    }


def layers():
    return {
        "dropped": [1],
        "score": "bi",
        "layers": {
            "candidates": ["layer 0", "layer 1", "layer 2"],
            "scores": {"bi": {"mean": [0.3, 0.1, 0.2], "languages": []}},
        },
    }


def fill(folder: Path, *leave_out: str) -> Path:
    """The folder with every file but those."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = "model: /srv/private/aya\nmethod: sparsegpt\nnm: '2:4'\nbits: 4\ngroup: 32\n"
    recipe += "calibration:\n  path: /srv/private/texts\n"
    files = {
        "recipe.yaml": f"{MARKER}, version 0.1.0\n{recipe}",
        "config.json": {"model_type": "cohere"},
        "results.json": results(),
        "evaluation.json": {"steps": {"evaluate": evaluation()}, "gate": None},
        "speed.json": speed(),
        "training.json": training(),
        "metrics.jsonl": "".join(f'{{"step": {i}, "loss": {0.5 - i / 10}}}\n' for i in range(4)),
        "layers.json": layers(),
        "steps.json": {
            "version": "0.1.0",
            "steps": [
                {"name": "compress", "seconds": 61.0, "fingerprint": "f" * 32},
                {"name": "heal", "seconds": 9.0, "fingerprint": "e" * 32},
            ],
        },
    }
    for name, value in files.items():
        if name not in leave_out:
            text = value if isinstance(value, str) else json.dumps(value)
            (folder / name).write_text(text, encoding="utf-8")
    if "layers.csv" not in leave_out:
        with open(folder / "layers.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            names = ("module", "shape", "loss", "relative_loss", "sparsity", "bits", "bytes")
            writer.writerow(names)
            for layer in range(2):
                for i, kind in enumerate(KINDS):
                    name = f"model.layers.{layer}.mlp.{kind}"
                    writer.writerow([name, "64x64", 1.0, 0.01 * (1 + i + layer), 0.5, 4, 2048])
    return folder


class Page(HTMLParser):
    """What a page is made of; .problems of a page that is none."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.problems, self.words = [], [], [], []
        self.feed(text)
        self.close()
        self.problems += [f"<{tag}> is never closed" for tag in self.open]
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if len({name for name, _ in attrs}) < len(attrs):
            self.problems.append(f"<{tag}> has an attribute twice")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.problems.append(f"<{tag}/> is no HTML")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")
        if tag not in ("span", "strong", "code"):
            self.words.append(" ")

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]
