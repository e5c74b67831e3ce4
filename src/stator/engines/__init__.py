"""The engines that come with Stator, and how to find any engine by name.

`echo` answers with the prompt and needs nothing. `transformers` runs any causal language model of that library; its parts are
`sequence` (one answer's state), `step_thread` (scheduling), `causal_lm`, `row_batch` and `sampling` (tensors), `token_inbox` (the
way back to the event loop). `vllm` and `sglang` adapt engines of other libraries: `foreign_engine` on top of `hosted` (a thread
with a loop), `foreign_request` and `foreign_answer` are what they share. Nothing here imports torch before an engine starts.
"""

from stator.engines.registry import create_engine, known_engines, load_engine

__all__ = ["create_engine", "known_engines", "load_engine"]
