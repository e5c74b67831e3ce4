"""Many simulated workers in virtual time."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from stator.errors import UsageError
from stator.mocker.options import MockerOptions
from stator.mocker.report import Simulation
from stator.mocker.simulation import Route, WorkerView, least_loaded, round_robin, simulate
from stator.mocker.workload import Arrival, synthetic_load

MS = 1_000_000
OPTIONS = MockerOptions()


def load(requests: int, *, rate: float = 14, seed: int = 0, **more: float) -> list[Arrival]:
    """About a hundred tokens for about a thousand."""
    return synthetic_load(
        requests=requests,
        rate=rate,
        prompt_tokens=1000,
        output_tokens=100,
        spread=0.5,
        shared_prefix_ratio=0.5,
        num_prefix_groups=50,
        seed=seed,
        **more,  # pyright: ignore[reportArgumentType]
    )


def at(time: float, prompt: int = 100, answer: int = 10, *, session: str = "", delay: float = 0.0, content: int = 0) -> Arrival:
    parts = ((content, prompt),) if content else ()
    return Arrival(time=time, prompt_tokens=prompt, output_tokens=answer, content=parts, session=session, delay=delay)


def alone(*arrivals: Arrival, options: MockerOptions = OPTIONS, until: float | None = None) -> Simulation:
    return simulate(arrivals, options=options, workers=1, route=round_robin(), until=until)


def test_a_single_request_takes_what_the_formulas_say() -> None:
    done = alone(at(2.0, 1024, 10))
    request = done.requests[0]
    assert (request.arrived_at, request.ttft, request.latency) == (2000 * MS, 38_283_432, 90_447_549)
    assert request.itl == 5_796_013
    assert done.gaps == {5_796_013: 9}
    assert done.workers[0].mean_usage == pytest.approx(16.5 / 16384, rel=0.05)


def test_the_same_load_gives_the_same_trace() -> None:
    one = simulate(load(300), options=OPTIONS, workers=4, route=least_loaded)
    two = simulate(load(300), options=OPTIONS, workers=4, route=least_loaded)
    assert one == two
    for other in (load(300, seed=1), load(299)):
        assert simulate(other, options=OPTIONS, workers=4, route=least_loaded).digest != one.digest
    assert simulate(load(300), options=OPTIONS, workers=4, route=round_robin()).digest != one.digest
    assert simulate(load(300), options=MockerOptions(num_gpu_blocks=200), workers=4, route=least_loaded).digest != one.digest


def test_a_request_that_comes_within_a_run_of_equal_passes_is_in_the_next_one() -> None:
    long, between = at(0, 64, 40), at(0.08, 64, 1)
    done = alone(long, between)
    first, second = done.requests
    alone_first = alone(long).requests[0]
    passes = -(-(second.arrived_at - first.first_token_at) // 5_746_593)
    assert second.admitted_at == first.first_token_at + passes * 5_746_593, "at the end of the pass it came in"
    assert first.latency > alone_first.latency


def test_requests_of_one_moment_share_a_pass() -> None:
    done = alone(at(1, 100, 1), at(1, 100, 1))
    assert done.workers[0].passes == 1
    assert done.requests[0].ended_at == done.requests[1].ended_at


def test_round_robin_and_the_least_loaded_worker() -> None:
    turns = simulate([at(0)] * 6, options=OPTIONS, workers=3, route=round_robin())
    assert [request.worker for request in turns.requests] == [0, 1, 2, 0, 1, 2]
    loads = simulate([at(0, 100, 500), at(0, 100, 5), at(0, 100, 500), at(1)], options=OPTIONS, workers=3, route=least_loaded)
    assert [request.worker for request in loads.requests] == [0, 1, 2, 1]


def test_a_route_sees_the_workers_as_they_are() -> None:
    seen: list[list[tuple[int, int, int, int]]] = []

    def cached(arrival: Arrival, hashes: list[int], workers: Sequence[WorkerView]) -> int:
        seen.append([(each.running, each.waiting, each.used_blocks, each.cached_blocks(hashes)) for each in workers])
        return max(range(len(workers)), key=lambda index: workers[index].cached_blocks(hashes))

    done = simulate(
        [at(0, 640, 2, content=5), at(0, 10, 2), at(1, 640, 2, content=5)], options=OPTIONS, workers=2, route=cached
    )
    assert seen == [[(0, 0, 0, 0), (0, 0, 0, 0)], [(0, 1, 0, 0), (0, 0, 0, 0)], [(0, 0, 0, 10), (0, 0, 0, 0)]]
    assert done.requests[2].cached_tokens == 640


def test_a_session_goes_on_after_the_answer() -> None:
    done = alone(at(0, session="a"), at(0, session="a", delay=0.5), at(0, session="b"), at(0, session="a"))
    first, second, other, third = done.requests
    assert other.arrived_at == 0
    assert second.arrived_at == first.ended_at + 500 * MS
    assert third.arrived_at == second.ended_at


def test_a_session_that_goes_on_at_once_is_in_the_next_pass() -> None:
    done = alone(at(0, 64, 300), at(0, 64, 5, session="a"), at(0, 64, 5, session="a"))
    assert done.requests[2].admitted_at == done.requests[2].arrived_at == done.requests[1].ended_at


def test_rejected_requests_are_told_apart() -> None:
    done = alone(at(0, 1000, 10), at(0, 100, 10), options=MockerOptions(num_gpu_blocks=10))
    assert [request.rejected for request in done.requests] == [True, False]
    assert [request.finished for request in done.requests] == [False, True]
    assert done.report()["completed_requests"] == 1
    assert done.workers[0].rejected == 1


def test_it_may_be_cut_short() -> None:
    done = alone(at(0, 1024, 100), at(10), until=0.1)
    assert done.ended_at == 100 * MS
    assert len(done.requests) == 1
    assert not done.requests[0].finished
    assert done.report()["completed_requests"] == 0


def test_the_report_has_the_reference_s_figures() -> None:
    report = simulate(load(200), options=OPTIONS, workers=2, route=round_robin()).report()
    assert report["num_requests"] == report["completed_requests"] == 200
    assert 0.2 < report["prefix_cache_reused_ratio"] < 0.5
    for name in ("ttft", "itl", "tpot", "e2e_latency"):
        ordered = [report[f"{which}_{name}_ms"] for which in ("min", "median", "p75", "p90", "p95", "p99", "max")]
        assert ordered == sorted(ordered)
        assert ordered[0] <= report[f"mean_{name}_ms"] <= ordered[-1]
    assert report["output_throughput_tok_s"] == pytest.approx(report["total_output_tokens"] / report["duration_ms"] * 1000)


def test_quantiles_are_values_that_occurred() -> None:
    done = alone(at(0, 100, 2), at(1, 1000, 2))
    report = done.report()
    assert report["median_ttft_ms"] == report["max_ttft_ms"] == done.requests[1].ttft / MS, "of two the larger"


@pytest.mark.parametrize("wrong", [at(-1), at(0, 0), at(0, 1, 0), at(0, session="a", delay=-1)])
def test_senseless_arrivals_are_refused(wrong: Arrival) -> None:
    with pytest.raises(UsageError, match="arrival 0"):
        alone(wrong)


def test_workers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one worker"):
        simulate([], options=OPTIONS, workers=0, route=round_robin())
    nowhere: Route = lambda arrival, hashes, workers: 7  # noqa: E731
    with pytest.raises(UsageError, match="worker 7 of 2"):
        simulate([at(0)], options=OPTIONS, workers=2, route=nowhere)


def test_the_example_of_the_page_works(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "mocker.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "requests=50_000" in code
    exec(compile(code.replace("50_000", "200"), "docs/mocker.md", "exec"), {})
    ttft, digest = capsys.readouterr().out.split()
    assert 20 < float(ttft) < 100
    assert len(digest) == 64


def check_hour(done: Simulation, *, hours: float, requests: int, tokens: float) -> None:
    assert done.ended_at >= hours * 3600 * 1000 * MS
    assert len(done.requests) >= requests
    assert done.tokens >= tokens
    assert all(request.finished for request in done.requests)
    assert all(worker.requests > 0 for worker in done.workers)


@pytest.mark.timeout(60)
def test_six_minutes_of_sixteen_workers_are_simulated_in_seconds() -> None:
    began = time.perf_counter()
    done = simulate(load(5200), options=OPTIONS, workers=16, route=least_loaded)
    took = time.perf_counter() - began
    check_hour(done, hours=0.1, requests=5000, tokens=500_000)
    assert took < 5 * 6, "a tenth of an hour in a tenth of a minute, with room for a busy machine"


@pytest.mark.load
@pytest.mark.timeout(300)
def test_an_hour_of_sixteen_workers_is_simulated_in_a_minute() -> None:
    began = time.perf_counter()
    done = simulate(load(51_000), options=OPTIONS, workers=16, route=least_loaded)
    took = time.perf_counter() - began
    check_hour(done, hours=1, requests=50_000, tokens=5_000_000)
    assert took < 60
