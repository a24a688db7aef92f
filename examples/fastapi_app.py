"""FastAPI around an engine.

MPREC_CHECKPOINTS="table.pt hybrid.pt" uvicorn --app-dir examples fastapi_app:app
curl localhost:8000/score -H 'content-type: application/json' -d '{"ids": [[3, 7]], "dense": [[0.5]]}'
"""

import asyncio
import contextlib
import os

from fastapi import FastAPI, HTTPException, Request

from mprec.serving import QueryRefusedError
from mprec.serving.build import engine_from_checkpoints, model_inputs


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI):
    files = os.environ["MPREC_CHECKPOINTS"].split()
    app.state.inputs = model_inputs(files)
    with engine_from_checkpoints(files, sla_s=float(os.environ.get("MPREC_SLA_MS", "10")) / 1e3) as engine:
        app.state.engine = engine
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/score")
async def score(request: Request) -> dict:
    from mprec.serving import rows_to_batch

    engine, inputs = request.app.state.engine, request.app.state.inputs
    arrived_s = engine.clock()
    try:
        query = await request.json()
        if not isinstance(query, dict) or "ids" not in query:
            raise ValueError('the body must be {"ids": [[...], ...], "dense": [[...], ...]}')
        batch = rows_to_batch(query["ids"], query.get("dense"), inputs.vocabularies, inputs.num_dense)
        answer = await asyncio.wrap_future(engine.submit(batch, arrived_s=arrived_s))
    except QueryRefusedError as error:
        raise HTTPException(503, {"error": str(error), "reason": error.reason}) from error
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    return {"scores": answer.scores.tolist(), "paths": answer.paths}
