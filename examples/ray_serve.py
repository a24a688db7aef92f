"""Ray Serve: as many replicas as wanted, on as many machines as wanted, an engine in each.

    pip install "mprec[ray]"
    python examples/ray_serve.py --checkpoints table.pt hybrid.pt --sla-ms 10 --replicas 2
    curl localhost:8000 -d '{"ids": [[3, 7], [1, [4, 5]]], "dense": [[0.5], [0.1]]}'

Ray balances queries over the replicas; within one, the engine chooses the path of every batch. Each replica
measures its own machine. ``ids`` has a row per sample and in it an ID, or a list of IDs, per feature.
"""

import argparse
import asyncio
from pathlib import Path

import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from mprec.serving import QueryRefusedError
from mprec.serving.build import engine_from_checkpoints, model_inputs


@serve.deployment(max_ongoing_requests=1000)  # the engine has a queue of its own, and merges what waits
class Scorer:
    def __init__(self, checkpoints: list[str], sla_s: float, threads: int, **options) -> None:
        torch.set_num_threads(threads)  # replicas of one machine share its cores
        self.inputs = model_inputs(checkpoints)
        self.engine = engine_from_checkpoints(checkpoints, sla_s=sla_s, **options).start()

    async def __call__(self, request: Request) -> JSONResponse:
        from mprec.serving import rows_to_batch

        arrived_s = self.engine.clock()
        try:
            query = await request.json()
            if not isinstance(query, dict) or "ids" not in query:
                raise ValueError('the body must be {"ids": [[...], ...], "dense": [[...], ...]}')
            ids, dense = query["ids"], query.get("dense")
            batch = rows_to_batch(ids, dense, self.inputs.vocabularies, self.inputs.num_dense)
            answer = await asyncio.wrap_future(self.engine.submit(batch, arrived_s=arrived_s))
        except QueryRefusedError as error:
            return JSONResponse({"error": str(error), "reason": error.reason}, status_code=503)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        return JSONResponse({"scores": answer.scores.tolist(), "paths": answer.paths})

    def __del__(self) -> None:
        if engine := getattr(self, "engine", None):  # none if the checkpoints were refused
            engine.close()


def application(
    checkpoints: list[str],
    sla_s: float = 0.010,
    replicas: int = 1,
    threads: int = 1,
    **options,
) -> serve.Application:
    """For ``serve.run``. ``options`` go to ``engine_from_checkpoints``."""
    files = [str(Path(file).resolve()) for file in checkpoints]  # replicas have other working folders
    deployment = Scorer.options(num_replicas=replicas, ray_actor_options={"num_cpus": threads})
    return deployment.bind(files, sla_s, threads, **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoints", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--sla-ms", type=float, default=10.0)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each replica")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    serve.start(http_options={"port": args.port})
    serve.run(
        application(args.checkpoints, args.sla_ms / 1e3, args.replicas, args.threads),
        blocking=True,
    )
