"""Tokenizers trained within a test: byte-level BPE, sentencepiece's BPE, one without bytes."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"


def byte_level(texts: Iterable[str], size: int, *, normalise: bool = True, **marks: str) -> Any:
    """Byte-level BPE as Qwen2 has it: NFC, no BOS, documents end with <|endoftext|>."""
    bare = Tokenizer(models.BPE())
    if normalise:
        bare.normalizer = normalizers.NFC()
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(bare, texts, size, [END, *marks.values()], initial_alphabet=alphabet)
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=END, pad_token=END, **marks)


def pieces(texts: Iterable[str], size: int) -> Any:
    """BPE on characters with ▁ for spaces, one before the text, and <0x41> for unknown bytes."""
    bytes_of_last_resort = [f"<0x{byte:02X}>" for byte in range(256)]
    bare = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bare.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bare.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _train(bare, texts, size, ["<unk>", "<s>", *bytes_of_last_resort], limit_alphabet=60)
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", unk_token="<unk>")


def words(texts: Iterable[str], size: int) -> Any:
    """WordPiece in small letters, as BERT has it: bytes cannot be had back from it."""
    bare = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    bare.normalizer = normalizers.BertNormalizer()
    bare.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bare.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=["[UNK]", "[PAD]"], show_progress=False
    )
    bare.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="[UNK]", pad_token="[PAD]")


def _train(bare: Tokenizer, texts: Iterable[str], size: int, marks: list[str], **more: Any) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=marks, show_progress=False, **more
    )
    bare.train_from_iterator(texts, trainer)
