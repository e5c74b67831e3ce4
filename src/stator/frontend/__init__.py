"""OpenAI's HTTP API over the models of a `ModelSource`.

A request passes `connection` (deadlines), `boundary` (ids, errors, log line), `generation` (its handler) with `body`,
`admissions` (its turn at the workers: a `gate` brings to life what `admission` decides), `choices` (the engine calls), `chunks`
(what clients read) and `sse` (how it leaves). `service` and `busy_threshold` have the other routes, `server` the socket, `errors`
the one table of error answers, `metrics` what is counted.

Where API keys are asked for, `doors` says by which routes; `key_ring` has the keys of a `key_file`, `key_account` what each may do.
"""

from stator.frontend.app import create_app
from stator.frontend.busy_threshold import LoadControl
from stator.frontend.config import FrontendConfig
from stator.frontend.metrics import FrontendMetrics
from stator.frontend.server import FrontendServer, bind

__all__ = ["FrontendConfig", "FrontendMetrics", "FrontendServer", "LoadControl", "bind", "create_app"]
