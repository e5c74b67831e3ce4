"""From an OpenAI request to token ids and back to text; the cards that describe models.

On the way in: `openai` (typed bodies) → `preprocess` (`template`, `tokenizer`) → `request.PreprocessedRequest`, for a worker.
On the way out: `output.EngineOutput` items, from a worker → `postprocess` (`detokenizer`, `stop`) → text deltas.
`card` describes a model, `served` is what the frontend sees of it. The extra `models` is needed for real models only.
"""
