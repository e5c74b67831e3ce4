"""Stator and its peers, measured alternately in one run. `python -m benchmarks`; the method is in README.md.

One question is one module: `runtime_planes`, `http_serving`, `idle_streams`, `token_path`. Each has `answer(plan) -> Report`.
This package is imported by processes of several environments (the references have their own), so this file imports nothing.
"""
