"""OpenAI's HTTP API over the models of a `ModelSource`.

A request passes `connection` (deadlines), `boundary` (ids, errors, log line), `generation` (its handler) with `body`,
`choices` (the engine calls), `chunks` (what clients read) and `sse` (how it leaves). `service` has the other routes, `server`
the socket, `errors` the one table of error answers, `metrics` what is counted.
"""

from stator.frontend.app import create_app
from stator.frontend.config import FrontendConfig
from stator.frontend.metrics import FrontendMetrics
from stator.frontend.server import FrontendServer, bind

__all__ = ["FrontendConfig", "FrontendMetrics", "FrontendServer", "bind", "create_app"]
