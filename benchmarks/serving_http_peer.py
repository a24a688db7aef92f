"""The usual server around a model: FastAPI with a pydantic model of the query, uvicorn, no engine.

python benchmarks/serving_http_peer.py CHECKPOINT PORT
"""

import sys

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from mprec.bags import Bags
from mprec.data import Batch
from mprec.paths import paths_from_checkpoints

app = FastAPI()


class Query(BaseModel):
    ids: list[list[int]]
    dense: list[list[float]]


@app.post("/score")
async def score(query: Query) -> dict:
    ids = torch.from_numpy(np.array(query.ids).T.reshape(-1).copy())
    dense = torch.tensor(query.dense, dtype=torch.float32)
    bags = Bags(ids, torch.arange(len(ids) + 1), num_features=len(query.ids[0]))
    batch = Batch(dense, bags, torch.zeros(len(dense)))
    with torch.inference_mode():
        return {"scores": app.state.model(batch).tolist()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    [path] = paths_from_checkpoints([sys.argv[1]])
    app.state.model = path.model
    uvicorn.run(app, port=int(sys.argv[2]), log_level="warning", access_log=False)
