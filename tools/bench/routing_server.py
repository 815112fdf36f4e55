"""Run by SGLang's interpreter: replies to /generate as an SGLang server does, with experts in several forms.

    python routing_server.py PORT FOLDER

It does to a finished request's experts what SGLang 0.5.21 does: pickle the tensor from the scheduler to the
tokenizer manager, encode it there, and write one JSON reply by orjson.  Nothing is generated.  FOLDER is for
the tables of the form `file`.
"""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import pybase64
import torch
import uvicorn
from fastapi import FastAPI, Request, Response

app = FastAPI()
TABLES: dict[tuple[int, ...], torch.Tensor] = {}
FOLDER = Path(sys.argv[2]) if len(sys.argv) > 2 else Path()


def table_of(tokens: int, layers: int, topk: int, experts: int) -> torch.Tensor:
    """[tokens, layers, topk] int32: random experts, all different for a token."""
    key = (tokens, layers, topk, experts)
    if key not in TABLES:
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand(256, layers, experts, generator=generator)
        few = scores.topk(topk).indices.to(torch.int32)
        TABLES[key] = few[torch.arange(tokens) % len(few)].contiguous()
    return TABLES[key]


def encoded(table: torch.Tensor, form: str, number: int) -> str:
    """What a reply carries in place of the table."""
    if form != "int32":
        table = table.to(torch.uint8)
    if form == "file":
        path = FOLDER / f"experts-{number}"
        path.write_bytes(table.numpy().tobytes())
        return str(path)
    table = pickle.loads(pickle.dumps(table))
    return pybase64.b64encode(table.numpy().tobytes()).decode("utf-8")


@app.post("/generate")
async def generate(request: Request) -> Response:
    """Replies to `responses` requests of `prompt` tokens with `tokens` more each."""
    body = orjson.loads(await request.body())
    replies = []
    for number in range(body["responses"]):
        meta_info: dict[str, Any] = {
            "finish_reason": {"type": "length"},
            "weight_version": "1",
            "output_token_logprobs": [[-0.5 - i % 7, i % 1000, None] for i in range(body["tokens"])],
        }
        if body["form"] != "none":
            tokens = body["prompt"] + body["tokens"] - 1
            table = table_of(tokens, body["layers"], body["topk"], body["experts"])
            meta_info["routed_experts"] = encoded(table, body["form"], number)
        replies.append({"output_ids": [i % 1000 for i in range(body["tokens"])], "meta_info": meta_info})
    return Response(orjson.dumps(replies), media_type="application/json")


@app.post("/cpu")
async def cpu() -> float:
    """Seconds for which this process has computed."""
    return time.process_time()


if __name__ == "__main__":
    torch.set_num_threads(1)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
