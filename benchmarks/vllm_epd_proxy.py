"""A proxy before vLLM servers that split encoder and language model. Runs in vLLM's environment, which has aiohttp.

For every request each media item goes to the encoder first, all at the same time, as a request of one token of its own;
when all are encoded the whole request goes to the language model, whose answer is passed on as it comes.
"""

import argparse
import asyncio
import json
from typing import Any

import aiohttp
from aiohttp import web

PATH = "/v1/chat/completions"


class Proxy:
    def __init__(self, encoder: str, language: str) -> None:
        self._encoder = encoder
        self._language = language
        self._session: aiohttp.ClientSession | None = None

    async def open(self, app: web.Application) -> None:
        timeout = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))

    async def models(self, request: web.Request) -> web.Response:
        assert self._session is not None
        async with self._session.get(f"{self._language}/v1/models") as answer:
            return web.Response(body=await answer.read(), content_type="application/json")

    async def chat(self, request: web.Request) -> web.StreamResponse:
        assert self._session is not None
        body = await request.json()
        encoded = await asyncio.gather(*(self._encode(body["model"], part) for part in _media(body["messages"])))
        handles = {name: value for found in encoded for name, value in found.items()}
        if handles:
            body["ec_transfer_params"] = handles
        async with self._session.post(self._language + PATH, json=body) as answer:
            response = web.StreamResponse(status=answer.status)
            response.content_type = answer.content_type
            await response.prepare(request)
            async for data in answer.content.iter_any():
                await response.write(data)
            await response.write_eof()
            return response

    async def _encode(self, model: str, part: dict[str, Any]) -> dict[str, Any]:
        assert self._session is not None
        body = {"model": model, "max_tokens": 1, "temperature": 0, "messages": [{"role": "user", "content": [part]}]}
        async with self._session.post(self._encoder + PATH, json=body) as answer:
            text = await answer.text()
            if answer.status != 200:
                raise web.HTTPBadGateway(text=f"encoder: {answer.status} {text[:300]}")
            return json.loads(text).get("ec_transfer_params") or {}


def _media(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lists = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part for content in lists for part in content if part["type"] != "text"]


async def _healthy(request: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--language", required=True)
    options = parser.parse_args()
    proxy = Proxy(options.encoder, options.language)
    app = web.Application(client_max_size=1 << 28)
    app.on_startup.append(proxy.open)
    app.router.add_post(PATH, proxy.chat)
    app.router.add_get("/v1/models", proxy.models)
    app.router.add_get("/health", _healthy)
    web.run_app(app, host="127.0.0.1", port=options.port, print=None)


main()
