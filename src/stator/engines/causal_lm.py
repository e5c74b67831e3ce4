"""A causal language model of the transformers library, stepped for several sequences at once."""

# pyright: basic, reportMissingImports=false
# torch and transformers belong to an extra (absent where types are checked) and are largely untyped.

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from stator.engines.row_batch import RowBatch
from stator.engines.sampling import Sampler
from stator.engines.sequence import Sequence, TokenChoice

__all__ = ["CausalLM"]

logger = logging.getLogger(__name__)

_CACHE_ARGUMENTS = ("past_key_values", "cache_params")
"""how forward() takes the cache: attention and hybrid models · state space models, which know no mask after the prompt"""


class CausalLM:
    """Prefill and decode. Used by one thread, the one that steps it.

    Plain attention caches of several sequences are stacked into `RowBatch`es of at most `max_rows` rows, one forward pass
    each. Other caches (sliding window, recurrent, hybrid) and `max_rows=1` mean one pass per sequence; a model that takes
    no cache at all reads its whole text at each step. Prompts are read in parts where every layer's cache is one of attention;
    a recurrent state takes the whole prompt or one token.
    """

    def __init__(self, model: Any, *, max_rows: int) -> None:
        self._model: Any = model
        self._max_rows = max_rows
        self._batches: list[RowBatch] = []
        parameters = inspect.signature(model.forward).parameters
        self._cache_argument = next((name for name in _CACHE_ARGUMENTS if name in parameters), None)
        if self._cache_argument == "cache_params" and "cache_position" in parameters:
            self._cache_argument = None  # transformers 4: each such model has a cache class of its own
        self._takes_positions = "position_ids" in parameters
        self._extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        layers = [type(layer) for layer in self._new_cache().layers] if self._cache_argument is not None else []
        self._stackable = max_rows > 1 and bool(layers) and set(layers) <= {DynamicLayer}
        self._divisible = bool(layers) and set(layers) <= {DynamicLayer, DynamicSlidingWindowLayer}
        self._partial: dict[Sequence, Any] = {}
        """caches of sequences that are being read"""
        if self._cache_argument is None:
            logger.warning("%s takes no cache: each token costs a pass over the whole text", type(model).__name__)

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def vocabulary(self) -> int:
        """Token ids are below this: rows of the input embedding."""
        return self._model.get_input_embeddings().weight.shape[0]

    @property
    def defaults(self) -> Any:
        """The model's generation config."""
        return self._model.generation_config

    @torch.inference_mode()
    def prefill(self, sequence: Sequence, most: int) -> TokenChoice | None:
        """See `TokenModel`. On an error the sequence holds nothing."""
        if sequence.state is None:
            sequence.state = Sampler(sequence, defaults=self.defaults, device=self.device)
        start, length = sequence.read, len(sequence.tokens)
        end = min(start + most, length) if self._divisible else length
        cache = self._partial.pop(sequence, None)
        if cache is None and self._cache_argument:
            cache = self._new_cache()
        try:
            logits = self._forward(
                ids=torch.tensor([sequence.tokens[start:end]], device=self.device),
                mask=torch.ones(1, end, dtype=torch.long, device=self.device),
                positions=torch.arange(start, end, device=self.device)[None],
                cache=cache,
            )
            sequence.read = end
            if end < length:
                self._partial[sequence] = cache
                return None
            choice = sequence.state.choose(sequence, logits)
        except Exception:
            self.release(sequence)
            raise
        self._place(RowBatch(cache, sequence))
        return choice

    @torch.inference_mode()
    def decode(self) -> list[tuple[Sequence, TokenChoice | Exception]]:
        """One step for every sequence held.

        A failing pass ends the rows of its batch, which are forgotten; a failing choice ends one row.
        """
        outcome: list[tuple[Sequence, TokenChoice | Exception]] = []
        for batch in tuple(self._batches):
            try:
                logits = self._step(batch)
            except Exception as error:
                self._batches.remove(batch)  # its cache may have grown in some layers only
                outcome += [(row, error) for row in batch.rows]
            else:
                outcome += _choose(batch.rows, logits)
        return outcome

    def evict(self, sequence: Sequence) -> None:
        """Forget what was read of a sequence, and nothing else: a seeded choice goes on where it was."""
        sequence.read = 0
        self._partial.pop(sequence, None)
        for batch in self._batches:
            if sequence in batch.rows:
                kept = [i for i, row in enumerate(batch.rows) if row is not sequence]
                if kept:
                    batch.keep(kept)
                else:
                    self._batches.remove(batch)
                return

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence; harmless if it is not held."""
        self.evict(sequence)
        sequence.state = None

    @torch.inference_mode()
    def check(self) -> None:
        """A pass over two tokens and one over the next, apart from all sequences."""
        cache = self._new_cache() if self._cache_argument else None
        masked = self._cache_argument != "cache_params"
        for start, end in ((0, 2), (2, 3)) if cache is not None else ((0, 3),):
            self._forward(
                ids=torch.zeros(1, end - start, dtype=torch.long, device=self.device),
                mask=torch.ones(1, end, dtype=torch.long, device=self.device) if masked or not start else None,
                positions=torch.arange(start, end, device=self.device)[None],
                cache=cache,
            ).cpu()

    def free(self) -> None:
        """Let go of the weights. Nothing may be called afterwards."""
        on_gpu = self.device.type == "cuda"
        self._batches.clear()
        self._partial.clear()
        self._model = None
        if on_gpu:
            torch.cuda.empty_cache()

    def _place(self, batch: RowBatch) -> None:
        """Let a freshly read sequence join a batch with room, or step alone."""
        if self._stackable:
            for other in self._batches:
                if len(other.rows) < self._max_rows and other.accepts(batch.width):
                    other.join(batch)
                    return
        self._batches.append(batch)

    def _step(self, batch: RowBatch) -> torch.Tensor:
        if batch.cache is None:
            return self._reread(batch)
        device = self.device
        logits = self._forward(
            ids=torch.tensor([row.tokens[-1:] for row in batch.rows], device=device),
            mask=batch.mask(device) if self._cache_argument == "past_key_values" else None,
            positions=torch.tensor(batch.stored, device=device)[:, None],
            cache=batch.cache,
        )
        batch.advance()
        return logits

    def _reread(self, batch: RowBatch) -> torch.Tensor:
        tokens = batch.rows[0].tokens
        return self._forward(
            ids=torch.tensor([tokens], device=self.device),
            mask=torch.ones(1, len(tokens), dtype=torch.long, device=self.device),
            positions=torch.arange(len(tokens), device=self.device)[None],
            cache=None,
        )

    def _forward(self, *, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits of the last position of each row: float32 [rows, vocabulary]."""
        arguments = dict(self._extra)
        if self._takes_positions:
            arguments["position_ids"] = positions
        if self._cache_argument is not None:
            arguments[self._cache_argument] = cache
            arguments["use_cache"] = True
        output = self._model(input_ids=ids, attention_mask=mask, return_dict=True, **arguments)
        return output.logits[:, -1, :].to(dtype=torch.float32, copy=True)

    def _new_cache(self) -> Any:
        return DynamicCache(config=self._model.config)


def _choose(rows: list[Sequence], logits: torch.Tensor) -> Iterator[tuple[Sequence, TokenChoice | Exception]]:
    """The next token of each row; one `argmax` for all that want nothing else."""
    greedy = torch.argmax(logits, dim=-1).tolist() if any(row.state.plain for row in rows) else []
    for index, row in enumerate(rows):
        if row.state.plain:
            yield row, TokenChoice(greedy[index])
            continue
        try:
            choice = row.state.choose(row, logits[index : index + 1])
        except Exception as error:
            yield row, error
        else:
            yield row, choice
