"""Models come and go with their workers: several in one cluster, one in several namespaces."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from stator.testing.serve_process import StatorProcess

pytestmark = pytest.mark.timeout(60)


@contextmanager
def worker(root: Path, *arguments: str) -> Iterator[StatorProcess]:
    environment = {
        "STATOR_FILE_ROOT": str(root),
        "STATOR_FILE_TTL": "2",
        "STATOR_WORKER_GRACE_PERIOD": "0",
        "STATOR_LOG": "info,stator.worker.worker=debug",
    }
    with StatorProcess("worker", *arguments, environment=environment) as process:
        process.wait_for("stator.worker.worker: serving")
        yield process


def last_request(process: StatorProcess, count: int) -> int:
    """The number of the line after the first `count` requests."""
    places = [place for place, line in enumerate(process.lines) if "prompt tokens" in line]
    return places[count - 1] + 1 if count else 0


def test_models_appear_and_disappear_with_their_workers(tmp_path: Path) -> None:
    environment = {"STATOR_FILE_ROOT": str(tmp_path), "STATOR_FILE_TTL": "2"}
    with StatorProcess("frontend", "--port", "0", environment=environment) as frontend:
        url = frontend.wait_for(r"listening on (http://\S+)").group(1)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=10) as client:

            def listed() -> list[str]:
                return [model.id for model in client.models.list()]

            def wait_for(*models: str) -> None:
                deadline = time.monotonic() + 10
                while listed() != list(models):
                    assert time.monotonic() < deadline, listed()
                    time.sleep(0.05)

            def ask(model: str, text: str = "hi") -> str:
                return client.completions.create(model=model, prompt=text).choices[0].text

            assert listed() == []
            with pytest.raises(openai.NotFoundError):
                ask("one")
            with (
                worker(tmp_path, "--name", "one") as first,
                worker(tmp_path, "--name", "one", "--namespace", "blue") as second,
                worker(tmp_path, "--name", "two", "--component", "other", "--option", "chunk=2") as third,
            ):
                wait_for("one", "two")
                for number in range(8):
                    assert ask("one", f"Grüße {number} 🚀") == f"Grüße {number} 🚀"
                assert ask("two", "定子") == "定子"
                for process, count in ((first, 4), (second, 4), (third, 1)):
                    # both namespaces take their turns, the other model none of them
                    for number in range(count):
                        process.wait_for("prompt tokens", since=last_request(process, number))
                    assert sum("prompt tokens" in line for line in process.lines) == count

                second.send(signal.SIGTERM)
                assert second.wait() == 0
                assert [ask("one") for _ in range(4)] == ["hi"] * 4
                third.send(signal.SIGTERM)
                assert third.wait() == 0
                wait_for("one")
                with pytest.raises(openai.NotFoundError):
                    ask("two")

                first.send(signal.SIGKILL)
                first.wait()
                with pytest.raises(openai.InternalServerError):
                    ask("one")  # listed until it was silent for the time to live, but not reached
                wait_for()
            with worker(tmp_path, "--name", "one"):
                wait_for("one")
                assert ask("one") == "hi"
        frontend.send(signal.SIGTERM)
        assert frontend.wait() == 0


def test_another_model_on_an_endpoint_is_refused(tmp_path: Path) -> None:
    environment = {"STATOR_FILE_ROOT": str(tmp_path)}
    with worker(tmp_path, "--name", "one"), StatorProcess("worker", "--name", "two", environment=environment) as second:
        assert second.wait() == 1
        assert second.lines[-1].startswith("error: cannot register model 'two' on endpoint dynamo.backend.generate")
