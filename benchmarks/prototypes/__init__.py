"""Yardsticks: the raw floor, and a sketch of the native plane without flow control, errors, cancellation or metrics."""
