"""`stator serve` with API keys: it starts, says how to ask, and its frontends divide the limits."""

from pathlib import Path

import openai
import pytest

from stator.testing.serve_process import StatorProcess, run_stator

pytestmark = pytest.mark.timeout(90)


def test_serve_with_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    added = run_stator("keys", "add", "--file", str(path), "--name", "team", "--rpm", "4000")
    key = added.stdout.strip()
    environment = {"STATOR_HTTP_API_KEYS_PATH": str(path), "STATOR_LOG": "debug"}
    with StatorProcess("serve", "--isolated", "--port", "0", "--frontends", "2", environment=environment) as process:
        url = process.wait_until_ready()
        process.wait_for("Authorization: Bearer YOUR_KEY")
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=10) as client:
            asked = client.chat.completions.with_raw_response.create(
                model="echo", messages=[{"role": "user", "content": "hello there"}]
            )
            assert asked.parse().choices[0].message.content == "hello there"
            assert asked.headers["x-ratelimit-limit-requests"] == "2000"
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="sk-other").models.list()
        assert key not in process.output
        assert "sk-other" not in process.output


def test_a_wrong_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("[[keys]]\nname = 5\n")
    with StatorProcess("serve", "--isolated", "--port", "0", environment={"STATOR_HTTP_API_KEYS_PATH": str(path)}) as process:
        assert process.wait(30) == 1
        (line,) = [line for line in process.lines if "error:" in line]
        assert "frontend 1 cannot start" in line
        assert "keys.toml, line 2: key 1: name: expected" in line
