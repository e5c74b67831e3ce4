"""Run by the reference's Python: replays traces in virtual time. Standard input: a JSON array of {"rows", "workers", "args"}; standard
output: the reports, in the same order, as the last line.
"""

import json
import sys
import tempfile

from dynamo._core import MockEngineArgs, run_mocker_trace_replay  # pyright: ignore[reportMissingImports]

reports = []
for case in json.load(sys.stdin):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as trace:
        for row in case["rows"]:
            trace.write(json.dumps(row) + "\n")
        trace.flush()
        reports.append(
            run_mocker_trace_replay(
                [trace.name],
                extra_engine_args=MockEngineArgs.from_json(json.dumps(case["args"])),
                num_workers=case["workers"],
                trace_block_size=case["args"].get("block_size", 64),
            )
        )
print(json.dumps(reports))
