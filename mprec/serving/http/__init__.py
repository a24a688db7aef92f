"""An engine over HTTP: an ASGI application, and a server for it that survives slow and dying clients.

    service = Service(model_inputs(files))
    service.take(engine)            # it answers from here on; before, it says that it is starting
    serve(service, listen("127.0.0.1", 8000))

``create_app(service)`` is the application alone, for another ASGI server. What it answers is written in
``/openapi.json``. Clients that would rather not write JSON have ``encode_query`` and ``decode_scores``.

This needs ``pip install 'mprec[serve]'``.
"""

try:
    import httptools
    import prometheus_client
    import starlette
    import uvicorn
except ImportError as error:  # of an extra
    raise ImportError(f"serving over HTTP needs {error.name}: pip install 'mprec[serve]'") from error

from mprec.serving.http.app import create_app
from mprec.serving.http.parse import Limits
from mprec.serving.http.server import listen, serve
from mprec.serving.http.service import Service
from mprec.serving.http.wire import decode_scores, encode_query

__all__ = ["Limits", "Service", "create_app", "decode_scores", "encode_query", "listen", "serve"]

del httptools, prometheus_client, starlette, uvicorn
