"""A language model small enough to build in a test: random weights, a real tokenizer, a chat template."""

# pyright: basic, reportMissingImports=false
# torch and transformers belong to an extra (absent where types are checked) and are largely untyped.

import json
from pathlib import Path

__all__ = ["build_tiny_llama"]

_TEXT = """The stator is the part of a motor that stands still while everything else spins.
Der Ständer steht still, während sich alles andere dreht. 定子在其他一切旋转时保持静止。
Статор неподвижен, пока всё остальное вращается. ステーターは静止しています。 🚀🙂👩‍👩‍👧
def generate(request, context): yield {"token_ids": [1, 2, 3], "finish_reason": "stop"}
"""
_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]


def build_tiny_llama(directory: Path, *, context_length: int = 512, vocabulary: int = 384, seed: int = 0) -> Path:
    """Write a Llama (2 layers, hidden size 64, float32) and a byte-level BPE tokenizer to `directory`.

    The same files each time for a seed. Takes about a second. Needs the extra `transformers`.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    size = _save_tokenizer(directory, vocabulary)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context_length,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1)
    model.save_pretrained(directory)
    return directory


def _save_tokenizer(directory: Path, vocabulary: int) -> int:
    """Train on a few lines of text; returns the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": _TEMPLATE,
        "model_max_length": 10**30,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tokenizer.get_vocab_size()
