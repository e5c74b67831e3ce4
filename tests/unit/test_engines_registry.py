"""Engines by name, and what importing them costs."""

import re
import subprocess
import sys
from collections.abc import AsyncIterator
from importlib.metadata import EntryPoint

import pytest

from stator.engines import create_engine, known_engines, load_engine
from stator.engines.echo import EchoEngine
from stator.engines.transformers import TransformersEngine, TransformersOptions
from stator.errors import ConfigError
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.runtime import Context, plugins
from stator.worker import EngineConfig, LLMEngine


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Install a plug-in that exists in name only."""
    point = EntryPoint(name=name, value=value, group="stator.engines")
    monkeypatch.setattr(plugins, "_registered", lambda group: {name: point})


def test_the_built_in_engines_are_found_like_plug_ins() -> None:
    assert {"echo", "transformers", "vllm", "sglang"} <= set(known_engines())
    assert load_engine("echo") is EchoEngine
    assert load_engine("transformers") is TransformersEngine


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'exho'.*echo, .*transformers"):
        load_engine("exho")


def test_a_plug_in_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "broken", "no_such_module_at_all:Engine")
    with pytest.raises(ConfigError, match=r"'broken'.*no_such_module_at_all"):
        load_engine("broken")


def test_a_plug_in_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "odd", "stator.errors:ConfigError")
    with pytest.raises(ConfigError, match="is no engine"):
        load_engine("odd")


def test_an_engine_may_be_named_by_module_and_class() -> None:
    assert load_engine("stator.engines.echo:EchoEngine") is EchoEngine


@pytest.mark.parametrize("path", ["no_such_module_at_all:Engine", "stator.engines.echo:Ecko", "stator.errors:ConfigError", ":"])
def test_a_module_or_class_that_is_not_there_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(path))):
        load_engine(path)


class Plain(LLMEngine):
    """Neither options nor a constructor."""

    async def start(self, instance_id: int) -> EngineConfig:
        raise NotImplementedError

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        yield EngineOutput(token_ids=[], finish_reason="stop")


def test_an_engine_needs_neither_options_nor_constructor() -> None:
    assert isinstance(create_engine(f"{__name__}:Plain"), Plain)
    with pytest.raises(ConfigError, match="no setting 'speed'"):
        create_engine(f"{__name__}:Plain", {"speed": "1"})


def test_options_are_read_like_settings() -> None:
    engine = create_engine("echo", {"delay": "0.5", "chunk": "3"})
    assert isinstance(engine, EchoEngine)
    assert engine.options.delay == 0.5
    assert engine.options.chunk == 3


def test_the_environment_sets_options_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATOR_ECHO_DELAY", "0.25")
    monkeypatch.setenv("STATOR_ECHO_CHUNK", "7")
    engine = create_engine("echo", {"chunk": 2})
    assert isinstance(engine, EchoEngine)
    assert (engine.options.delay, engine.options.chunk) == (0.25, 2)


def test_a_plug_in_without_its_class_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "gone", "stator.errors:NoSuchClass")
    with pytest.raises(ConfigError, match=r"'gone'.*NoSuchClass"):
        load_engine("gone")


@pytest.mark.parametrize(
    ("options", "complaint"), [({"dealy": "1"}, "delay"), ({"delay": "soon"}, "delay"), ({"chunk": 0}, "chunk")]
)
def test_wrong_options_are_named(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        create_engine("echo", options)


def test_the_transformers_engine_needs_a_model() -> None:
    with pytest.raises(ConfigError, match="needs a model"):
        create_engine("transformers")


async def test_a_missing_extra_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("loading", "causal_lm", "row_batch", "sampling"):
        monkeypatch.delitem(sys.modules, f"stator.engines.{part}", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    engine = TransformersEngine(TransformersOptions(model="any"))
    with pytest.raises(ConfigError, match=r'needs torch: pip install "stator\[transformers\]"') as caught:
        await engine.start(1)
    assert "\n" not in caught.value.message
    await engine.cleanup()


@pytest.mark.timeout(60)
def test_naming_an_engine_imports_no_torch() -> None:
    """It takes seconds, and it may not be there."""
    code = (
        "import sys; from stator.engines import create_engine; "
        "[create_engine(name, {'model': 'm'}) for name in ('transformers', 'vllm', 'sglang')]; "
        "print(sorted({'torch', 'transformers', 'tokenizers', 'numpy', 'vllm', 'sglang', 'huggingface_hub'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    assert result.stdout.strip() == "[]"
