"""`/busy_threshold` says and does what the reference's does (`spec/40 §3.4`), for those who may use it."""

from collections.abc import AsyncIterator, Mapping
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec import UNSET, UnsetType

from stator.errors import UsageError
from stator.frontend import FrontendConfig
from stator.frontend.busy_threshold import BusyThreshold
from stator.llm.monitor import WorkerMonitor
from stator.llm.thresholds import LoadConfig, Thresholds
from stator.settings import load as load_settings
from stator.testing.fake_models import FakeEngine, FakeModels
from stator.testing.frontend_kit import Answer, RawClient, RunningFrontend, frontend
from stator.testing.manual_clock import ManualClock

pytestmark = pytest.mark.timeout(20)

PATH = "/busy_threshold"


class Control:
    """Thresholds of the models it was made with."""

    def __init__(self, **models: Thresholds) -> None:
        self.models = models

    def thresholds(self, model: str) -> Thresholds | None:
        return self.models.get(model)

    def set_thresholds(
        self,
        model: str,
        *,
        active_decode_blocks_threshold: float | UnsetType | None = UNSET,
        active_prefill_tokens_threshold: int | UnsetType | None = UNSET,
        active_prefill_tokens_threshold_frac: float | UnsetType | None = UNSET,
    ) -> Thresholds:
        given = {
            "active_decode_blocks_threshold": active_decode_blocks_threshold,
            "active_prefill_tokens_threshold": active_prefill_tokens_threshold,
            "active_prefill_tokens_threshold_frac": active_prefill_tokens_threshold_frac,
        }
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not UNSET}
        assert None not in changes.values(), "null leaves a threshold as it is"
        if changes.get("active_prefill_tokens_threshold_frac") == 666:
            raise UsageError("666 is out of range")
        self.models[model] = msgspec.structs.replace(self.models[model], **changes)
        return self.models[model]

    def all_thresholds(self) -> Mapping[str, Thresholds]:
        return self.models


@pytest.fixture
def control() -> Control:
    return Control(a=Thresholds(active_decode_blocks_threshold=0.9), b=Thresholds(active_prefill_tokens_threshold=5))


@pytest.fixture
async def running(control: Control) -> AsyncIterator[RunningFrontend]:
    async with frontend(FakeModels(), load=control) as running:
        yield running


async def call(running: RunningFrontend, method: str, body: bytes = b"") -> Answer:
    async with RawClient(running.port) as client:
        await client.request(method, PATH, body)
        return await client.answer()


async def post(running: RunningFrontend, **fields: Any) -> tuple[int, Any]:
    answer = await call(running, "POST", msgspec.json.encode(fields))
    return answer.status, answer.json()


def entry(model: str, decode: float | None = None, tokens: int | None = None, frac: float | None = None) -> dict[str, Any]:
    return {
        "model": model,
        "active_decode_blocks_threshold": decode,
        "active_prefill_tokens_threshold": tokens,
        "active_prefill_tokens_threshold_frac": frac,
    }


async def test_get_lists_all_models(running: RunningFrontend) -> None:
    answer = await call(running, "GET")
    assert (answer.status, answer.json()) == (200, {"thresholds": [entry("a", 0.9), entry("b", None, 5)]})


async def test_a_model_alone_is_asked_for(running: RunningFrontend) -> None:
    assert await post(running, model="b") == (200, entry("b", None, 5))
    assert await post(running, model="zzz") == (200, entry("zzz"))


async def test_what_is_given_is_set_and_the_rest_stays(running: RunningFrontend, control: Control) -> None:
    changed = await post(running, model="a", active_prefill_tokens_threshold=7, active_decode_blocks_threshold=None, other=1)
    assert changed == (200, entry("a", 0.9, 7))
    assert await post(running, model="a", active_decode_blocks_threshold=0) == (200, entry("a", 0, 7))
    assert await post(running, model="a", active_prefill_tokens_threshold_frac=-1.5) == (200, entry("a", 0, 7, -1.5))
    assert control.models["b"] == Thresholds(active_prefill_tokens_threshold=5)


async def test_unknown_models_have_no_thresholds_to_set(running: RunningFrontend) -> None:
    status, body = await post(running, model="zzz", active_prefill_tokens_threshold=7)
    assert status == 404
    assert body == {"error": "Model 'zzz' not found. Thresholds can only be set for discovered models."}


@pytest.mark.parametrize("bad", [1.5, -0.1, 2])
async def test_a_fraction_is_one(running: RunningFrontend, control: Control, bad: float) -> None:
    status, body = await post(running, model="a", active_decode_blocks_threshold=bad, active_prefill_tokens_threshold=7)
    assert status == 400
    assert body == {"error": f"active_decode_blocks_threshold must be between 0.0 and 1.0, got {float(bad)}"}
    assert control.models["a"] == Thresholds(active_decode_blocks_threshold=0.9), "nothing was changed"


async def test_what_the_monitor_refuses_is_told(running: RunningFrontend) -> None:
    refused = await post(running, model="a", active_prefill_tokens_threshold_frac=666)
    assert refused == (400, {"error": "666 is out of range"})


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"{",
        b"[]",
        b'{"model": 5}',
        b'{"model": "a", "active_prefill_tokens_threshold": -1}',
        b'{"model": "a", "active_prefill_tokens_threshold": 1.5}',
        b'{"model": "a", "active_decode_blocks_threshold": "x"}',
        b'{"model": "\xff"}',
    ],
)
async def test_bodies_of_another_shape_are_unprocessable(running: RunningFrontend, body: bytes) -> None:
    answer = await call(running, "POST", body)
    assert answer.status == 422
    assert answer.json()["error"].startswith("Failed to deserialize the JSON body")


async def test_the_real_monitor_answers(control: Control) -> None:
    monitor = WorkerMonitor(LoadConfig(), ManualClock())
    async with frontend(FakeModels(), load=monitor) as running:
        assert (await call(running, "GET")).json() == {"thresholds": []}
        assert await post(running, model="zzz") == (200, entry("zzz"))
        assert (await post(running, model="zzz", active_prefill_tokens_threshold=1))[0] == 404


@pytest.mark.parametrize("admin_api", ["off", "loopback", "all"])
async def test_the_route_can_be_removed(control: Control, admin_api: str) -> None:
    async with frontend(FakeModels(), load=control, admin_api=admin_api) as running:
        assert (await call(running, "GET")).status == (404 if admin_api == "off" else 200)
        assert (await post(running, model="a"))[0] == (404 if admin_api == "off" else 200)


async def test_without_a_monitor_there_is_no_route() -> None:
    models = FakeModels()
    models.add("a", FakeEngine())
    async with frontend(models) as running:
        assert (await call(running, "GET")).status == 404


@pytest.mark.parametrize(
    ("text", "expected"), [("true", "off"), ("1", "off"), ("0", "loopback"), ("false", "loopback"), ("", "loopback")]
)
def test_the_references_switch_removes_it(monkeypatch: pytest.MonkeyPatch, text: str, expected: str) -> None:
    monkeypatch.setenv("DYN_DISABLE_FRONTEND_ADMIN_API", text)
    assert load_settings(FrontendConfig).admin_api == expected


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        (("127.0.0.1", 5), True),
        (("127.8.0.1", 5), True),
        (("::1", 5, 0, 0), True),
        (("::ffff:127.0.0.1", 5, 0, 0), True),
        (("10.0.0.7", 5), False),
        (("::ffff:10.0.0.7", 5, 0, 0), False),
        (("fe80::1%eth0", 5, 0, 2), False),
        ("", False),
        (None, False),
    ],
)
async def test_only_clients_on_this_machine_may_unless_all_may(control: Control, peer: object, local: bool) -> None:
    request: Any = SimpleNamespace(
        transport=SimpleNamespace(get_extra_info=lambda name: peer if name == "peername" else None),
        headers={"X-Forwarded-For": "127.0.0.1", "Host": "localhost"},
    )
    guarded = BusyThreshold(control, loopback_only=True)
    assert (await guarded.get(request)).status == (200 if local else 403)
    if not local:
        assert (await guarded.post(request)).status == 403
    assert (await BusyThreshold(control, loopback_only=False).get(request)).status == 200
