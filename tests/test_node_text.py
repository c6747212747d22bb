"""The line that a node shows: in the browser that queued it alone, and as text, whatever it holds."""

import asyncio
import os
import time

import aiohttp
import pytest

from workflows.graphs import node
from workflows.server import find_comfyui, serve

TEXT = b"\x00\x00\x00\x03"  # how ComfyUI marks a message of progress text


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH does not point to a ComfyUI")
    with serve(find_comfyui(None), tmp_path_factory.mktemp("comfyui")) as running:
        yield running


def queue(server, prefix: str, client: dict) -> None:
    """Save a report under a name, and wait until that is done."""
    graph = {"1": node("PrimitiveString", value='{"psnr": 30}')}
    graph["2"] = node("DHASaveReport", report=["1", 0], filename_prefix=prefix)
    prompt_id = server.post("/prompt", {"prompt": graph, **client})["prompt_id"]
    while prompt_id not in server.get("/history"):
        time.sleep(0.1)


async def listen(server, prefix: str, **client: str) -> list[list[str]]:
    """The texts that two browsers get, `asker` and `other`, while a prompt is run."""
    async with aiohttp.ClientSession() as session:
        browsers = [await session.ws_connect(f"{server.url}/ws?clientId={name}") for name in ("asker", "other")]
        await asyncio.to_thread(queue, server, prefix, client)
        return [await read_texts(browser) for browser in browsers]


async def read_texts(browser: aiohttp.ClientWebSocketResponse) -> list[str]:
    """The texts that have come to a browser so far."""
    found = []
    while True:
        try:
            message = await browser.receive(timeout=1)
        except (asyncio.TimeoutError, TimeoutError):
            return found
        if message.type == aiohttp.WSMsgType.BINARY and message.data.startswith(TEXT):
            found.append(message.data[9:].decode())  # after the node's id of one letter and its length


def test_the_one_who_asked_is_told(server):
    assert asyncio.run(listen(server, "owl", client_id="asker")) == [["saved output/owl_00001_.json"], []]


def test_what_nobody_watches_is_told_to_nobody(server):
    assert asyncio.run(listen(server, "cat")) == [[], []]


def test_names_of_files_are_no_html(server):
    (asker, _) = asyncio.run(listen(server, "<img src=x onerror='a()'>", client_id="asker"))
    assert asker == ["saved output/&lt;img src=x onerror=&#x27;a()&#x27;&gt;_00001_.json"]
