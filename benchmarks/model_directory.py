"""A tiny but complete model directory for HTTP: byte-level BPE tokenizer of 4 000 tokens, chat template, configuration.

There are no weights: the workers of `http_serving` send fixed tokens.
"""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from benchmarks.fixed_tokens import MODEL_NAME, fixed_tokens

__all__ = ["MODEL_NAME", "expected_text", "write_model"]

_VOCABULARY = 4_096
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_WORDS = ("the", "of", "and", "to", "in", "is", "hello", "world", "weather", "system", "user", "assistant", "token", "stream")
_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(directory: Path) -> None:
    """Write the files; the same ones every time."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {text: tokenizer.token_to_id(text) for text in _SPECIAL}
    end_of_text, _, end_of_turn = ids.values()
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 32768,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "add_bos_token": False,
            "added_tokens_decoder": {
                str(number): {
                    "content": text,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for text, number in ids.items()
            },
            "chat_template": _TEMPLATE,
        },
        "config.json": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_turn,
            "torch_dtype": "bfloat16",
        },
        "generation_config.json": {
            "bos_token_id": end_of_text,
            "eos_token_id": [end_of_turn, end_of_text],
            "pad_token_id": end_of_text,
            "do_sample": True,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=1))


def expected_text(directory: Path, tokens: int) -> str:
    """The text a right answer of `tokens` tokens has."""
    ids = fixed_tokens(directory)
    return Tokenizer.from_file(str(directory / "tokenizer.json")).decode([ids[i % len(ids)] for i in range(tokens)])


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    chance = random.Random(0)
    syllables = [a + b for a in "bcdfghklmnprstvz" for b in ("a", "e", "i", "o", "u", "ar", "en", "il", "or", "us")]
    words = [*_WORDS, *("".join(chance.choices(syllables, k=chance.randint(2, 3))) for _ in range(2500))]
    corpus = [" ".join(chance.choices(words, k=20)) for _ in range(8000)]
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY - len(_SPECIAL),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(list(_SPECIAL))
    return tokenizer
