"""A tiny random Cohere model with a tokenizer of its own, and small parallel texts for it."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CohereConfig, CohereForCausalLM, PreTrainedTokenizerFast

SENTENCES = {
    "en": ["the cat sleeps in the sun", "water boils at a hundred degrees", "read the file first"],
    "es": ["el gato duerme al sol", "el agua hierve a cien grados", "lee primero el archivo"],
    "ja": ["猫は日なたで寝ている", "水は百度で沸騰する", "まずファイルを読む"],
}


def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the sentences; ids of <pad>, <bos>, <eos> are 0, 1, 2."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([s for lines in SENTENCES.values() for s in lines], trainer)
    marks = {"bos_token": "<bos>", "eos_token": "<eos>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", **marks)


def save_model(folder: Path, seed: int = 0, vocab: int = 300) -> Path:
    """A two-layer Cohere model with loud random weights, so that two seeds differ visibly."""
    torch.manual_seed(seed)
    config = CohereConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        logit_scale=1.0,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    CohereForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_texts(folder: Path, repeat: int = 1) -> Path:
    """<lang>.txt for every language, each sentence `repeat` times."""
    folder.mkdir(parents=True, exist_ok=True)
    for lang, lines in SENTENCES.items():
        (folder / f"{lang}.txt").write_text("\n".join(lines * repeat) + "\n", encoding="utf-8")
    return folder
