"""Names of the reference that Stator does not have: they can be imported, and say so when they are used."""

from typing import Any, NoReturn

from stator.dynamo.errors import NotThere

__all__ = ["GAPS", "Gap"]

_KIT = "is not planned: Stator's own kit is `stator.worker`"
_MOCKER = "is not planned: Stator's own simulated engine is `stator.mocker`"
_KV = "is not there yet: it belongs to KV routing"
_MONITOR = "is not there yet: nothing in Stator reads forward-pass metrics"
_SERVE = "is not planned: `stator serve` and `stator.frontend` are Stator's own HTTP service"
_PLANNER = "is not planned: it sizes the reference's deployments"
_MEDIA = "is not planned: Stator serves text"
_LORA = "is not planned yet: no engine of Stator loads adapters"

GAPS: dict[str, str] = {
    "AicEngineConfig": _PLANNER,
    "AicPerfConfig": _PLANNER,
    "ApproxKvIndexer": _KV,
    "Block": "is not planned: it belongs to the reference's KV block manager",
    "BlockList": "is not planned: it belongs to the reference's KV block manager",
    "BlockManager": "is not planned: it belongs to the reference's KV block manager",
    "EngineCapacity": _PLANNER,
    "EngineCapacityRequest": _PLANNER,
    "EngineConfig": _SERVE,
    "EnginePerfLimits": _PLANNER,
    "EntrypointArgs": _SERVE,
    "FpmDirectPublisher": _MONITOR,
    "FpmEventRelay": _MONITOR,
    "FpmEventSubscriber": _MONITOR,
    "HttpAsyncEngine": _SERVE,
    "HttpService": _SERVE,
    "KserveGrpcService": "is not planned: Stator has no gRPC frontend",
    "KvIndexer": _KV,
    "KvRouter": _KV,
    "KvRouterConfig": _KV,
    "KvbmRequest": "is not planned: it belongs to the reference's KV block manager",
    "Layer": "is not planned: it belongs to the reference's KV block manager",
    "LoRADownloader": _LORA,
    "MediaDecoder": _MEDIA,
    "MediaFetcher": _MEDIA,
    "MockEngineArgs": _MOCKER,
    "ModelCardInstanceId": _SERVE,
    "MultimodalEmbeddingCachePublisher": _MEDIA,
    "OptimizationTarget": _PLANNER,
    "OverlapScores": _KV,
    "PlannerDecision": _PLANNER,
    "PlannerReplayBridge": _PLANNER,
    "PythonAsyncEngine": _SERVE,
    "RadixTree": _KV,
    "ReasoningConfig": _MOCKER,
    "RoutedEngine": _KV,
    "RouterConfig": _KV,
    "RoutingConstraints": _KV,
    "RustEnginePerfModel": _PLANNER,
    "RustEnginePerfOptions": _PLANNER,
    "SelectionService": _KV,
    "SglangArgs": _MOCKER,
    "TrtllmArgs": _MOCKER,
    "VirtualConnectorClient": _PLANNER,
    "VirtualConnectorCoordinator": _PLANNER,
    "backend": _KIT,
    "get_reasoning_parser_names": "is not planned yet: Stator's frontend parses no reasoning",
    "get_tool_parser_names": "is not planned yet: Stator's frontend parses no tool calls",
    "log_message": "is not planned: log through Python's `logging`",
    "make_engine": _SERVE,
    "resolve_routing_image_token_id": _MEDIA,
    "run_input": _SERVE,
    "run_kv_indexer": _KV,
    "run_mocker_synthetic_trace_replay": _MOCKER,
    "run_mocker_trace_replay": _MOCKER,
    "run_select_service": _KV,
    "run_slot_tracker": _KV,
}
"""name → why it is not here, as the end of a sentence that begins with the name"""


class Gap:
    """Stands for one of `GAPS`. Calling it, or taking an attribute from it, raises `NotThere`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return f"<{self._name}: not in Stator>"

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python looks for its own: copying, inspecting, documenting
            raise AttributeError(name)
        self._refuse()

    def __or__(self, other: Any) -> Any:  # in annotations: `KvRouter | None`
        return Any

    __ror__ = __or__

    def _refuse(self) -> NoReturn:
        raise NotThere(f"{self._name} {GAPS[self._name]} (docs/dynamo.md)")
