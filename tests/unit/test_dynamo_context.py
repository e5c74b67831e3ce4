"""Context, metadata, items and models under the reference's names."""

import asyncio
from typing import Any

import pytest

from stator.dynamo._core import ModelDeploymentCard, ModelRuntimeConfig, ModelType, RouterMode, WorkerType, lora_name_to_id
from stator.dynamo.annotated import Annotated, annotated
from stator.dynamo.context import Context
from stator.dynamo.registration import fetch_model
from stator.dynamo.runtime.logging import configure_dynamo_logging
from stator.errors import PeerProtocolError, UsageError
from stator.llm.card import ModelCard, card_to_json
from stator.protocol.annotated import Annotated as WireAnnotated
from stator.runtime import Context as StatorContext

pytestmark = pytest.mark.timeout(30)


async def test_a_context_of_an_arrived_request_shows_its_trace() -> None:
    headers = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "x=1", "x-request-id": "outer"}
    context = Context.of(StatorContext("r", metadata={"k": "v"}, headers=headers))
    assert (context.trace_id, context.parent_span_id) == ("a" * 32, "b" * 16)
    assert context.span_id is not None and len(context.span_id) == 16 and context.span_id == context.span_id != "b" * 16
    assert context.trace_headers() == {
        "traceparent": f"00-{'a' * 32}-{context.span_id}-01",
        "tracestate": "x=1",
        "x-request-id": "outer",
    }
    context.metadata["k2"] = "v2"
    assert context.for_call().metadata == {"k": "v", "k2": "v2"}
    bare = Context.of(StatorContext("r"))
    assert (bare.trace_id, bare.span_id, bare.parent_span_id, bare.trace_headers()) == (None, None, None, None)


async def test_waiting_for_the_end_of_a_context() -> None:
    context = Context("x")
    given_up = context.async_killed_or_stopped()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(given_up, 0.01)
    waiting = context.async_killed_or_stopped()
    context.stop_generating()
    assert await waiting is True and await context.async_killed_or_stopped() is True
    assert (context.is_stopped(), context.is_killed()) == (True, False)
    context.kill_generating()
    assert context.is_killed()


def test_outside_of_a_loop_a_context_can_be_made_and_not_waited_for() -> None:
    context = Context("x")
    with pytest.raises(RuntimeError, match="no running event loop"):
        context.async_killed_or_stopped()
    context.stop_generating()
    assert context.is_stopped()
    with pytest.raises(AttributeError):
        context.other = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_items_with_annotations() -> None:
    plain = annotated({"a": 1})
    assert (plain.data(), plain.event(), plain.comments(), plain.id(), plain.is_error()) == ({"a": 1}, None, None, None, False)
    assert repr(plain) == "Annotated(data={'a': 1}, event=None, comment=[], id=None)"
    full = annotated(WireAnnotated(data=1, event="error", comment=["c"], id="i"))
    assert (full.data(), full.event(), full.comments(), full.id(), full.is_error()) == (1, "error", ["c"], "i", True)
    assert annotated(WireAnnotated(event="done")).data() is None
    assert Annotated(5).data() == 5


def test_flags_of_models() -> None:
    both = ModelType.Chat | ModelType.Completions
    assert both == ModelType.Completions | ModelType.Chat and hash(both) == hash(both | ModelType.Chat)
    assert (str(both), str(ModelType.Empty), str(ModelType.TensorBased)) == ("chat,completions", "", "tensor")
    assert both.supports_chat() and not ModelType.Embedding.supports_chat()
    with pytest.raises(TypeError):
        ModelType.Chat | 3  # pyright: ignore[reportOperatorIssue, reportUnusedExpression]
    assert (int(RouterMode.KV), str(RouterMode.KV), str(WorkerType.Prefill)) == (3, "RouterMode.KV", "prefill")


def test_a_runtime_config_becomes_part_of_a_card() -> None:
    config = ModelRuntimeConfig()
    config.context_length, config.taints, config.topology_domains = 77, {"b", "a"}, {"rack": "r1"}
    config.set_engine_specific("k", '{"a": [1]}')
    config.set_disaggregated_endpoint("host", 3)
    config.set_structural_tag_mode("on")
    assert (config.get_engine_specific("k"), config.runtime_data) == ({"a": [1]}, {"k": '{"a": [1]}'})
    assert (config.get_engine_specific("z"), config.bootstrap_host, config.bootstrap_port) == (None, "host", 3)
    made = config.for_card()
    assert (made.context_length, made.taints, made.topology_domains) == (77, ["a", "b"], {"rack": "r1"})
    assert (made.runtime_data, made.structural_tag_mode) == ({"k": {"a": [1]}}, "on")
    assert made.disaggregated_endpoint is not None and made.disaggregated_endpoint.bootstrap_port == 3
    with pytest.raises(AttributeError):
        config.typo = 1  # pyright: ignore[reportAttributeAccessIssue]


def rejected(**values: Any) -> None:
    config = ModelRuntimeConfig()
    for name, value in values.items():
        setattr(config, name, value)
    config.for_card()


def test_a_runtime_config_names_what_does_not_fit() -> None:
    with pytest.raises(TypeError, match="context_length"):
        rejected(context_length="long")
    with pytest.raises(ValueError, match="kv_transfer_enforcement"):
        rejected(kv_transfer_enforcement="maybe")
    with pytest.raises(ValueError, match="tokenizer backend 'x'"):
        rejected(tokenizer_backend="x")
    config = ModelRuntimeConfig()
    for call in (config.set_structural_tag_mode, config.set_structural_tag_scope, config.set_structural_tag_schema):
        with pytest.raises(ValueError, match="Invalid structural_tag"):
            call("zz")
    with pytest.raises(TypeError, match="JSON text"):
        config.set_engine_specific("k", {"a": 1})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="not JSON"):
        config.set_engine_specific("k", "bare")


def test_cards_are_read_and_written() -> None:
    import msgspec

    text = msgspec.json.encode(card_to_json(ModelCard(display_name="m", source_path="/models/m"))).decode()
    card = ModelDeploymentCard.from_json_str(text)
    assert (card.name(), card.source_path(), card.local_dir()) == ("m", "/models/m", "/models/m")
    assert card.model_type() == ModelType.Chat | ModelType.Completions
    assert card.runtime_config()["data_parallel_size"] == 1
    assert card.to_json_str() == text
    for bad in ("zz", "[]"):
        with pytest.raises(ValueError, match="model card"):
            ModelDeploymentCard.from_json_str(bad)
    with pytest.raises(PeerProtocolError, match="display_name"):
        ModelDeploymentCard.from_json_str("{}")


def test_numbers_of_adapters_are_the_references() -> None:
    assert [lora_name_to_id(name) for name in ("my-lora", "", "a/b")] == [868637996, 1979294118, 2025323241]


async def test_models_are_not_downloaded(tmp_path: Any) -> None:
    assert await fetch_model(str(tmp_path)) == str(tmp_path)
    with pytest.raises(UsageError, match="does not download"):
        await fetch_model("somebody/some-model")


def test_logging_is_set_up_by_stators_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    monkeypatch.setenv("DYN_LOG", "warn")
    try:
        configure_dynamo_logging("service", 3)
        logging.getLogger("a.b").warning("seen")
        logging.getLogger("a.b").info("not seen")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        logging.captureWarnings(False)
    out = capsys.readouterr().err
    assert "seen" in out and "not seen" not in out
