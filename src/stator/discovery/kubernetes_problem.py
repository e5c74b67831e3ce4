"""What can go wrong with a request to the API server; mapped to Stator's errors where the discovery's callers are."""

__all__ = ["ApiProblem"]

_PASSING = (401, 408, 409, 429)
"""refusals that the next try may not meet: a token is exchanged, a conflict is over"""


class ApiProblem(Exception):
    """The API server refused, failed, or was not reached. The text has no credentials in it.

    `status` is the HTTP status, 0 if there was none; `retry_after` is what the server asked for, in seconds.
    """

    def __init__(self, message: str, *, status: int = 0, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after

    @property
    def expired(self) -> bool:
        """410 Gone: the version that was named is not kept any more."""
        return self.status == 410

    @property
    def lasting(self) -> bool:
        """Whether the same request will be refused again until somebody changes something."""
        return 400 <= self.status < 500 and self.status not in _PASSING and not self.expired
