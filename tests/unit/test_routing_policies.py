"""The rules of each policy, their names, and the table of requests in flight."""

from collections import Counter
from importlib.metadata import entry_points
from random import Random

import pytest

from stator.errors import ConnectFailed, UsageError
from stator.routing import (
    ANYWHERE,
    BUILT_IN,
    Candidate,
    DeviceWeighted,
    Direct,
    LeastLoaded,
    Occupancy,
    Policy,
    PowerOfTwo,
    RoundRobin,
    RouteRequest,
    RoutingConfig,
    UniformRandom,
    policy_name,
)
from stator.settings import load


def candidates(*loads: int, device: str = "cuda") -> list[Candidate]:
    return [Candidate(instance_id=n, load=load, device_type=device) for n, load in enumerate(loads, 1)]


def chosen(policy: Policy, free: list[Candidate], times: int = 1000) -> Counter[int]:
    random = Random(7)
    return Counter(policy.choose(free, ANYWHERE, random).instance_id for _ in range(times))


def test_round_robin_takes_turns_from_the_first() -> None:
    policy = RoundRobin()
    free = candidates(0, 0, 0)
    assert [policy.choose(free, ANYWHERE, Random(0)).instance_id for _ in range(7)] == [1, 2, 3, 1, 2, 3, 1]


def test_random_is_uniform() -> None:
    counts = chosen(UniformRandom(), candidates(9, 0, 0, 0), 4000)
    assert sorted(counts) == [1, 2, 3, 4] and all(850 < count < 1150 for count in counts.values())


def test_direct_goes_to_the_target_alone() -> None:
    free = candidates(0, 0)
    assert Direct().choose(free, RouteRequest(target=2), Random(0)).instance_id == 2
    with pytest.raises(UsageError, match="needs the id of an instance"):
        Direct().choose(free, ANYWHERE, Random(0))
    with pytest.raises(ConnectFailed, match="instance_id=5 not found"):
        Direct().choose(free, RouteRequest(target=5), Random(0))


def test_least_loaded_is_the_exact_minimum_with_uniform_ties() -> None:
    assert chosen(LeastLoaded(), candidates(3, 1, 2)) == {2: 1000}
    counts = chosen(LeastLoaded(), candidates(1, 0, 0, 2, 0), 3000)
    assert sorted(counts) == [2, 3, 5] and all(850 < count < 1150 for count in counts.values())


def test_power_of_two_compares_two_different_ones() -> None:
    assert chosen(PowerOfTwo(), candidates(4)) == {1: 1000}
    assert chosen(PowerOfTwo(), candidates(5, 4)) == {2: 1000}
    counts = chosen(PowerOfTwo(), candidates(0, 1, 2), 3000)
    assert 3 not in counts and 1850 < counts[1] < 2150


def test_power_of_two_keeps_the_first_of_equals() -> None:
    class Script(Random):
        values = (0.9, 0.0)

        def random(self) -> float:
            self.values, value = self.values[1:], self.values[0]
            return value

    assert PowerOfTwo().choose(candidates(1, 1, 1), ANYWHERE, Script()).instance_id == 3
    assert PowerOfTwo().choose(candidates(0, 1, 1), ANYWHERE, Script()).instance_id == 1


@pytest.mark.parametrize(
    ("cpu", "cuda", "device"),
    [
        ((0,), (7,), "cuda"),  # allowed = 7*1 // (8*1) = 0
        ((0,), (8,), "cpu"),  # allowed = 1
        ((1,), (8,), "cuda"),
        ((1,), (16,), "cpu"),
        ((0, 0), (4,), "cpu"),  # allowed = 4*2 // 8 = 1
        ((0,), (8, 7), "cuda"),  # allowed = 15 // 16 = 0
    ],
)
def test_device_weighted_gives_cpus_their_share(cpu: tuple[int, ...], cuda: tuple[int, ...], device: str) -> None:
    free = [*candidates(*cpu, device="cpu"), *candidates(*cuda)]
    assert DeviceWeighted().choose(free, ANYWHERE, Random(0)).device_type == device


def test_device_weighted_is_least_loaded_within_the_class() -> None:
    assert chosen(DeviceWeighted(), candidates(3, 1, 2)) == {2: 1000}
    assert chosen(DeviceWeighted(), candidates(3, 1, 2, device="cpu")) == {2: 1000}
    free = [*candidates(9, 5, device="cpu"), Candidate(instance_id=8, load=2), Candidate(instance_id=9, load=1, device_type="")]
    assert chosen(DeviceWeighted(ratio=1), free) == {9: 1000}
    with pytest.raises(UsageError, match="ratio = 0"):
        DeviceWeighted(ratio=0)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("round_robin", "round_robin"),
        ("round-robin", "round_robin"),
        ("Random", "random"),
        (" direct ", "direct"),
        ("least-loaded", "least_loaded"),
        ("power-of-two", "power_of_two"),
        ("power_of_two_choices", "power_of_two"),
        ("power-of-two-choices", "power_of_two"),
        ("device-aware-weighted", "device_weighted"),
        ("device_aware_weighted", "device_weighted"),
    ],
)
def test_the_references_spellings_are_accepted(text: str, name: str) -> None:
    assert policy_name(text) == name


def test_an_unknown_policy_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        UsageError, match=r"called 'round-robbin' \(did you mean 'round_robin'\?\); there are: device_weighted, direct"
    ):
        policy_name("round-robbin")
    with pytest.raises(UsageError, match="called 'kv'"):
        policy_name("kv")
    assert policy_name("k_v", ["kv"]) == "kv"


def test_every_built_in_is_an_entry_point_of_its_name() -> None:
    registered = {entry.name: entry for entry in entry_points(group="stator.routing") if entry.value.startswith("stator.")}
    assert set(BUILT_IN) <= set(registered)
    for name in BUILT_IN:
        policy: Policy = registered[name].load()()
        assert policy.name == name
        assert policy.needs_load == (name in ("least_loaded", "power_of_two", "device_weighted"))


def test_settings_read_the_references_names() -> None:
    config = load(RoutingConfig, env={"DYN_ROUTER_MODE": "power-of-two", "DYN_ENCODER_CUDA_TO_CPU_RATIO": "0"})
    assert (config.policy, config.device_ratio) == ("power_of_two", 8)


def test_occupancy_counts_follow_the_instances() -> None:
    occupancy = Occupancy()
    first, second = occupancy.update({1: "cpu", 2: "cuda"})
    occupancy.acquire(first)
    occupancy.acquire(first)
    occupancy.acquire(second)
    assert (occupancy.load(1), occupancy.load(2), occupancy.load(3), occupancy.total) == (2, 1, 0, 3)
    assert occupancy.update({2: "cpu", 1: "cpu"}) == (second, first) and second.device_type == "cpu"
    occupancy.update({2: "cuda"})
    assert occupancy.total == 1
    (_, again) = occupancy.update({2: "cuda", 1: "cuda"})
    occupancy.release(first)
    assert again is not first and (again.load, first.load) == (0, 1)
    occupancy.release(second)
    occupancy.release(second)
    assert second.load == 0
