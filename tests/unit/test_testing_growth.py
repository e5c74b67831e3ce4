"""Work whose time grows with the square of its size is told from work in proportion to it."""

from stator.testing.growth import LINEAR, Growth


def measured(small: int, large: int) -> Growth:
    growth = Growth()
    for _ in growth.rounds(5):
        with growth.small():
            sum(range(small))
        with growth.large():
            sum(range(large))
    return growth


def test_time_in_proportion_to_the_size_is_linear() -> None:
    assert measured(30_000, 90_000).ratio <= LINEAR


def test_time_that_grows_with_the_square_is_not() -> None:
    assert measured(30_000, 270_000).ratio > LINEAR
