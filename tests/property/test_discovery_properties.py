"""Any key has one file name; any history, read at any pace, ends in the truth."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from stator.discovery.file_names import file_name, read_file_name
from stator.discovery.view import View
from stator.discovery.watch import Added, Removed, Watch
from stator.protocol.records import EndpointRecord, Query, Record, RecordKey
from stator.testing.discovery_suite import endpoint_record

segment = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), max_size=12)
ids = st.integers(0, 2**64 - 1)
keys = st.builds(lambda *parts: RecordKey("v1/instances", parts[:3], parts[3]), segment, segment, segment, ids) | st.builds(
    lambda *parts: RecordKey("v1/mdc", parts[:3], parts[3], parts[4]), segment, segment, segment, ids, segment
)


@given(keys)
def test_a_key_is_read_back_from_its_file_name(key: RecordKey) -> None:
    name = file_name(key) if len(key.path.encode()) < 80 else ""
    if name:
        assert name.replace("%", "").isascii()
        assert name.replace("%", "").isalnum()
        assert read_file_name(key.bucket, name) == key


@given(st.text(max_size=40))
def test_a_file_name_is_a_key_or_an_error(name: str) -> None:
    from stator.errors import PeerProtocolError

    try:
        assert file_name(read_file_name("v1/instances", name)) == name
    except PeerProtocolError:
        pass


changes = st.tuples(st.integers(0, 5), st.sampled_from(["generate", "generate2"]), st.none() | st.sampled_from("abc"))
moves = st.lists(st.just("read") | st.lists(changes, min_size=1, max_size=6), max_size=30)


def check(watch: Watch, before: dict[RecordKey, Record], batch: list[Added | Removed]) -> None:
    """Removed first, nothing twice, and nothing that was known already."""
    assert batch == sorted(batch, key=lambda change: isinstance(change, Added))
    touched = [change.key if isinstance(change, Removed) else change.record.key for change in batch]
    assert len(set(touched)) == len(touched)
    after = dict(before)
    for change in batch:
        if isinstance(change, Removed):
            del after[change.key]
        else:
            assert after.get(change.record.key) != change.record
            after[change.record.key] = change.record
    assert after == watch.current


@settings(deadline=None)
@given(moves)
def test_a_watch_read_at_any_pace_ends_in_the_truth(history: list[str | list[tuple[int, str, str | None]]]) -> None:
    query = Query(EndpointRecord.bucket, ("demo", "backend", "generate"))

    async def prepared() -> None: ...

    async def run() -> None:
        view = View()
        async with view.watch(query, prepared) as watch:
            check(watch, {}, await anext(watch))
            for move in [*history, "read"]:
                if isinstance(move, str):
                    if watch.pending:
                        before = dict(watch.current)
                        check(watch, before, await anext(watch))
                else:
                    batch: dict[RecordKey, Record | None] = {}
                    for instance, endpoint, tcp in move:
                        record = endpoint_record(instance, f"demo.backend.{endpoint}", tcp=tcp or "")
                        batch[record.key] = record if tcp else None
                    view.apply(batch)
                    assert watch.pending <= len(watch.current) + len(view.records)
            assert watch.current == view.select(query)

    asyncio.run(run())
