"""Tokenizers small enough to train in a test, of the two kinds that real models have, and a model directory around one."""

# pyright: basic
# tokenizers is largely untyped.

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

__all__ = ["END", "START", "build_byte_level", "build_fallback", "build_model_directory"]

START = "<|im_start|>"
END = "<|im_end|>"

_TEXT = (
    """the of and to in is that it for was on are as with his they at be this have from or one had by word but not
what all were we when your can said there use an each which she do how their if will up other about out many hello world
Der Ständer steht still, während sich alles andere dreht. Ça va très bien, à bientôt.
定子在其他一切旋转时保持静止。 ステーターは静止しています。 Статор неподвижен. 🚀🙂🎉""".splitlines()
    * 4
)

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_byte_level(path: Path, *, size: int = 500) -> Path:
    """Write a byte-level BPE tokenizer (as GPT-2, Llama 3 and Qwen have) with two special tokens and one plain added one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.add_special_tokens([START, END])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.save(str(path))
    return path


def build_fallback(path: Path, *, size: int = 500) -> Path:
    """Write a tokenizer like SentencePiece's with byte fallback (as Llama 2 and Gemma have): the first space is dropped."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, limit_alphabet=60)
    trained.train_from_iterator(_TEXT[:2], trainer)
    learned = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *learned["vocab"]]
    vocabulary = {name: place for place, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(path))
    return path


def build_model_directory(directory: Path, *, context_length: int = 256, **files: Any) -> Path:
    """Write everything of a model but the weights: byte-level tokenizer, ChatML template, configs.

    `files` by name without ".json" replace the contents of the small files; None leaves a file out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    build_byte_level(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    contents: dict[str, Any] = {
        "config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "max_position_embeddings": context_length,
            "eos_token_id": end,
        },
        "generation_config": {"eos_token_id": [end, tokenizer.token_to_id(START)]},
        "tokenizer_config": {"bos_token": None, "eos_token": END, "chat_template": _TEMPLATE},
        **files,
    }
    for name, content in contents.items():
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory
