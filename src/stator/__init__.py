"""Stator: a distributed runtime for LLM inference."""

__version__ = "0.1.0"
