"""The shipped assets are what their READMEs say: the demo model and the parallel texts."""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import distaya_ext

ASSETS = Path(distaya_ext.__file__).parent / "assets"
MODEL = ASSETS / "nano-aya"
LANGUAGES = tuple("en zh ar cs nl fr de el he hi id it ja ko fa pl pt ro ru es tr uk vi".split())


def front_matter_languages(readme: str) -> list[str]:
    """Return the `- xx` entries under `language:` in a README's YAML front matter."""
    front = readme.split("---\n")[1]
    block = front.split("language:\n")[1].split("\nlicense:")[0]
    return [line.removeprefix("  - ") for line in block.splitlines()]


# ---------------------------------------------------------------- nano-aya


def test_model_config_is_cohere():
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["CohereForCausalLM"]
    assert config["model_type"] == "cohere"
    assert (config["num_hidden_layers"], config["hidden_size"]) == (8, 256)


def test_model_weights_open_and_count():
    with safe_open(MODEL / "model.safetensors", "pt") as weights:
        slices = {name: weights.get_slice(name) for name in weights.keys()}
        count = sum(math.prod(part.get_shape()) for part in slices.values())
        assert {part.get_dtype() for part in slices.values()} == {"BF16"}
        for name in slices:
            assert torch.isfinite(weights.get_tensor(name)).all(), name
    assert count == 8_128_768  # the model card's figure


def test_model_loads_completely_and_predicts():
    model, info = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert len(tokenizer) == model.config.vocab_size == 8192
    text = "The application sends a request to the server and waits for the response."
    ids = tokenizer("<BOS_TOKEN>" + text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    # A uniform guess costs ln 8192 = 9.01 nats; trained weights must be far below it.
    assert loss < 6.0


def test_model_card():
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert sorted(front_matter_languages(card)) == sorted(LANGUAGES)
    assert "\nlicense: apache-2.0\n" in card and "\nlibrary_name: transformers\n" in card
    assert "](../" not in card and "](./" not in card
