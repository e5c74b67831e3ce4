"""The refusals of `faults/test_security_refusals.py` on both event loops, whose transports are not alike."""

from faults.test_security_refusals import (
    certificates,
    pytestmark,
    test_a_secret_that_does_not_fit,
    test_silence_at_the_door_has_an_end,
    test_tls_that_does_not_fit,
)

__all__ = [
    "certificates",
    "pytestmark",
    "test_a_secret_that_does_not_fit",
    "test_silence_at_the_door_has_an_end",
    "test_tls_that_does_not_fit",
]
