"""`stator serve --engine mocker`: simulated workers behind the real service, with their load known to the frontend."""

import asyncio
import re
from collections.abc import Iterator

import aiohttp
import openai
import pytest

from stator.testing.serve_process import StatorProcess

pytestmark = pytest.mark.timeout(90)

OPTIONS = ("speedup_ratio=50", "num_gpu_blocks=1000", "block_size=16", "max_num_seqs=8", "data_parallel_size=2")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    options = [part for option in OPTIONS for part in ("--option", option)]
    with StatorProcess("serve", "--isolated", "--engine", "mocker", "--workers", "2", "--port", "0", *options) as process:
        yield process.wait_until_ready(workers=2)


def test_answers_are_as_long_as_asked_and_the_second_finds_the_first_in_the_cache(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answers = [client.completions.create(model="mocker", prompt="word " * 40, max_tokens=20) for _ in range(8)]
    assert {(each.choices[0].finish_reason, len(each.choices[0].text)) for each in answers} == {("length", 20)}
    assert len({each.choices[0].text for each in answers}) == 1, "the same request has the same answer"
    cached = [
        each.usage.prompt_tokens_details.cached_tokens for each in answers if each.usage and each.usage.prompt_tokens_details
    ]
    assert max(each or 0 for each in cached) == 192, "12 full blocks of 16 of 200 tokens"


def test_a_burst_is_spread_over_all_ranks_and_nothing_is_left(url: str) -> None:
    async def burst() -> tuple[list[str], str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            calls = [client.completions.create(model="mocker", prompt=f"{n} " * 9, max_tokens=30) for n in range(32)]
            answers = await asyncio.gather(*calls)
        async with aiohttp.ClientSession(url) as http, http.get("/metrics") as page:
            return [each.choices[0].finish_reason for each in answers], await page.text()

    reasons, page = asyncio.run(burst())
    assert reasons == ["length"] * 32
    running = re.findall(r"^dynamo_frontend_active_requests\{.*\} (\S+)$", page, re.MULTILINE)
    assert running
    assert set(running) == {"0"}


def test_the_operator_takes_workers_out_by_threshold_and_back(url: str) -> None:
    async def change() -> list[tuple[int, float | None]]:
        seen: list[tuple[int, float | None]] = []
        async with aiohttp.ClientSession(url) as http:
            for value in (None, 0.25, 1.0):
                body = {"model": "mocker"} if value is None else {"model": "mocker", "active_decode_blocks_threshold": value}
                async with http.post("/busy_threshold", json=body) as answer:
                    seen.append((answer.status, (await answer.json())["active_decode_blocks_threshold"]))
        return seen

    assert asyncio.run(change()) == [(200, 1.0), (200, 0.25), (200, 1.0)]


def test_what_workers_report_is_on_the_frontends_page(url: str) -> None:
    async def reported() -> str:
        async with aiohttp.ClientSession(url) as http:
            while True:
                async with http.get("/metrics") as answer:
                    page = await answer.text()
                if len(re.findall(r"^stator_worker_kv_used_blocks\{", page, re.MULTILINE)) == 4:
                    return page
                await asyncio.sleep(0.05)

    page = asyncio.run(asyncio.wait_for(reported(), 20))
    assert re.search(r"^stator_load_events_total\{.*\} [1-9]", page, re.MULTILINE)
