"""A simulated engine: block pool, continuous batching and a timing model, in real time for a worker or in virtual time for thousands.

No GPU, no wall clock of its own. `engine` is what `stator worker --engine mocker` runs, `simulation` a whole fleet under load.
"""
