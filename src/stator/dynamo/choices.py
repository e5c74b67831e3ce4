"""Names to choose from, with the numbers the reference gives them."""

import enum

__all__ = ["EngineType", "ModelInput", "RouterMode", "WorkerType"]


class _Choice(enum.Enum):
    def __int__(self) -> int:
        return self.value

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


class RouterMode(_Choice):
    """How a client chooses among instances."""

    RoundRobin = 0
    Random = 1
    PowerOfTwoChoices = 2
    KV = 3
    Direct = 4
    LeastLoaded = 5
    DeviceAwareWeighted = 6


class ModelInput(_Choice):
    """What a worker takes."""

    Text = 1
    Tokens = 2
    Tensor = 3


class WorkerType(_Choice):
    """The part a worker plays."""

    Prefill = 1
    Decode = 2
    Encode = 3
    Aggregated = 4

    def __str__(self) -> str:
        return self.name.lower()


class EngineType(_Choice):
    """Kinds of engines that `make_engine` of the reference knows."""

    Echo = 0
    Dynamic = 1
    Mocker = 2
