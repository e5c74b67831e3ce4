"""Settings that engines of real models have alike, as types of fields; each engine gives the defaults."""

from typing import Annotated

from stator.config import Setting
from stator.errors import ConfigError

__all__ = [
    "ContextLength",
    "DataParallelSize",
    "ModelName",
    "ModelSource",
    "PublishKvEvents",
    "TensorParallelSize",
    "WeightType",
    "need_model",
]

ModelSource = Annotated[str, Setting(doc="model directory, or id on the Hugging Face hub")]
ModelName = Annotated[str, Setting(doc="model name to serve; empty: the model's own")]
ContextLength = Annotated[
    int | None, Setting(doc="longest prompt and answer together; none: the model's limit", unit="tokens", ge=2)
]

# of engines that spread over GPUs by themselves
WeightType = Annotated[str, Setting(doc="type of weights and activations, e.g. bfloat16; auto: the checkpoint's own")]
TensorParallelSize = Annotated[int, Setting(doc="GPUs that share each layer", ge=1)]
DataParallelSize = Annotated[int, Setting(doc="copies of the model, each with a scheduler of its own", ge=1, le=1024)]
PublishKvEvents = Annotated[bool, Setting(doc="publish what the prefix cache holds, for routers")]


def need_model(engine: str, model: str) -> None:
    """Raises `ConfigError` without one."""
    if not model:
        raise ConfigError(f"the {engine} engine needs a model: a directory or an id on the Hugging Face hub")
