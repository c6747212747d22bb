"""Start a real ComfyUI in a process of its own and drive it over HTTP and websocket."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

PACK = Path(__file__).resolve().parent.parent
PACK_NAME = "dha"
FOLDERS = ("models/checkpoints", "custom_nodes", "input", "output", "temp", "user")
FLAGS = ("--disable-auto-launch", "--disable-api-nodes", "--dont-print-server", "--use-pytorch-cross-attention")
# Without passive waiting two processes on the same cores slow each other down many times over.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONUNBUFFERED": "1",
}
NOT_PART_OF_THE_PACK = shutil.ignore_patterns(".*", "__pycache__", "demo-output*", "tests")

Graph = dict[str, dict[str, Any]]
Progress = Callable[[str, int, int], None]


class ServerError(RuntimeError):
    """The server could not be started, refused a graph or failed in it; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """A finished graph: what each output node sent to the browser, by node id."""

    outputs: dict[str, dict[str, Any]]

    def text(self, node: str) -> str:
        return self.outputs[node]["text"][0]

    def images(self, node: str) -> list[dict[str, str]]:
        return self.outputs[node]["images"]


class Server:
    """A running ComfyUI; use `serve` to make one."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path):
        self.process, self.url, self.log = process, url, log

    def read_log(self, lines: int = 25) -> str:
        """The last lines of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def get(self, path: str, timeout: float = 60) -> Any:
        """JSON as objects, anything else as bytes."""
        return self._request(urllib.request.Request(self.url + path), timeout)

    def post(self, path: str, body: Any, timeout: float = 60) -> Any:
        headers = {"content-type": "application/json"}
        return self._request(urllib.request.Request(self.url + path, json.dumps(body).encode(), headers), timeout)

    def fetch(self, image: dict[str, str]) -> bytes:
        """The file behind one entry of `Outcome.images`."""
        return self.get("/view?" + urllib.parse.urlencode(image))

    def interrupt(self) -> None:
        """Cancel what is running, as the browser's button does."""
        self.post("/interrupt", {})

    def run(self, graph: Graph, on_progress: Progress | None = None, timeout: float = 600) -> Outcome:
        """Queue an API-format graph and wait for its end.

        `on_progress(node_id, value, total)` is called as nodes start (0 of 0) and as they advance. Raises ServerError
        when the graph is refused, fails, is cancelled or is not done after `timeout` seconds.
        """
        prompt_id = asyncio.run(self._follow(graph, on_progress or (lambda *_: None), timeout))
        for _ in range(100):
            # The last event is sent just before the history is written.
            if prompt_id in (history := self.get(f"/history/{prompt_id}")):
                return Outcome(history[prompt_id]["outputs"])
            time.sleep(0.1)
        raise ServerError(f"ComfyUI finished the graph but keeps no record of it.\n{self.read_log()}")

    def wait_until_ready(self, base: Path, timeout: float) -> None:
        """Raises ServerError when the process ends, or is not ready in time."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            self._check_alive()
            with contextlib.suppress(OSError):
                if str(base) not in self.get("/system_stats", timeout=5)["system"]["argv"]:
                    raise ServerError(f"Another ComfyUI answers at {self.url}; try again.")
                return
            time.sleep(0.1)
        raise ServerError(f"ComfyUI was not ready after {timeout:.0f} s.\n{self.read_log()}")

    def stop(self) -> None:
        """End this server's own process: politely, then not."""
        # Not SIGINT, which a process started in the background ignores.
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _request(self, request: urllib.request.Request, timeout: float) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                body = response.read()
                return json.loads(body) if "json" in response.headers.get("content-type", "") else body
        except urllib.error.HTTPError as error:
            raise ServerError(explain_refusal(error.code, error.read())) from None

    def _check_alive(self) -> None:
        if (code := self.process.poll()) is not None:
            raise ServerError(f"ComfyUI ended with exit status {code}. The end of its log:\n{self.read_log()}")

    async def _follow(self, graph: Graph, on_progress: Progress, timeout: float) -> str:
        """Queue the graph and pass its events on until it ends; the prompt's id."""
        client = uuid.uuid4().hex
        session = aiohttp.ClientSession()
        async with session, session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as events:
            body = {"prompt": graph, "client_id": client}
            prompt_id = (await asyncio.to_thread(self.post, "/prompt", body))["prompt_id"]
            end = time.monotonic() + timeout
            while time.monotonic() < end:
                self._check_alive()
                try:
                    message = await events.receive(timeout=2)
                except (asyncio.TimeoutError, TimeoutError):
                    continue
                if message.type == aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    if is_finished(graph, prompt_id, event["type"], event.get("data") or {}, on_progress):
                        return prompt_id
                elif message.type != aiohttp.WSMsgType.BINARY:
                    await asyncio.sleep(0.5)
                    self._check_alive()
                    raise ServerError(f"ComfyUI closed the connection.\n{self.read_log()}")
        await asyncio.to_thread(self.interrupt)
        raise ServerError(f"The graph was not done after {timeout:.0f} s and has been cancelled.\n{self.read_log()}")


def is_finished(graph: Graph, prompt_id: str, kind: str, data: dict[str, Any], on_progress: Progress) -> bool:
    """Whether an event ends the graph; progress is passed on. Raises ServerError for failure and cancellation."""
    if data.get("prompt_id") != prompt_id:
        return False
    if kind == "executing" and data.get("node"):
        on_progress(data["node"], 0, 0)
    elif kind == "progress":
        on_progress(data["node"], data["value"], data["max"])
    elif kind == "execution_error":
        node = f"{data['node_type']} (node {data['node_id']})"
        raise ServerError(f"{node} failed: {data['exception_type']}: {data['exception_message'].strip()}")
    elif kind == "execution_interrupted":
        raise ServerError(f"The graph was cancelled in {data.get('node_type')} (node {data.get('node_id')}).")
    return kind == "execution_success"


def explain_refusal(code: int, body: bytes) -> str:
    """What ComfyUI says about a request that it does not take, in one line per fault."""
    try:
        answer = json.loads(body)
        lines = [answer["error"]["message"]]
        for node, faults in (answer.get("node_errors") or {}).items():
            lines += [f"{faults['class_type']} (node {node}): {e['message']}: {e['details']}" for e in faults["errors"]]
    except (ValueError, KeyError, TypeError):
        lines = [body.decode(errors="replace")[:2000]]
    return f"ComfyUI answered {code}: " + "\n".join(lines)


def find_comfyui(path: str | Path | None) -> Path:
    """The folder of a ComfyUI from an argument or COMFYUI_PATH; raises FileNotFoundError."""
    path = path or os.environ.get("COMFYUI_PATH")
    if not path or not (Path(path) / "main.py").is_file() or not (Path(path) / "comfy").is_dir():
        raise FileNotFoundError(f"No ComfyUI at {path!r}; give the folder that holds its main.py with --comfyui PATH.")
    return Path(path).resolve()


def link_pack(base: Path, pack: Path) -> None:
    """Put the pack among the base directory's custom nodes, by a link or, where links fail, by a copy.

    Raises ServerError where an unlinked pack lies there, since it may be another version.
    """
    place = base / "custom_nodes" / PACK_NAME
    if place.is_symlink():
        place.unlink()
    if place.exists():
        raise ServerError(f"{place} exists already; give an empty folder as the server's base directory.")
    try:
        place.symlink_to(pack, target_is_directory=True)
    except OSError:
        shutil.copytree(pack, place, ignore=NOT_PART_OF_THE_PACK)


def choose_device_flags() -> tuple[str, ...]:
    """`--cpu` where torch sees no accelerator, with the precision that figures are taken in pinned."""
    import torch

    if torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available():
        return ()
    return ("--cpu", "--force-fp32")


def is_fast_in_bf16() -> bool:
    """Whether figures are taken on a processor here, and it multiplies bf16, which is much faster than fp32."""
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in older ones
    return bool(choose_device_flags()) and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serve(
    comfyui: Path, base: Path, *, pack: Path = PACK, flags: Sequence[str] | None = None, timeout: float = 180
) -> Iterator[Server]:
    """A ComfyUI on loopback with `base` as its directory and the pack installed; stopped at the end.

    The log is `base/server.log`. Raises ServerError when it does not come up in `timeout` seconds.
    """
    base = base.resolve()
    for folder in FOLDERS:
        (base / folder).mkdir(parents=True, exist_ok=True)
    link_pack(base, pack)
    port, log = find_port(), base / "server.log"
    command = [sys.executable, "main.py", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base)]
    command += ["--database-url", f"sqlite:///{(base / 'user' / 'comfyui.db').as_posix()}", *FLAGS]
    command += choose_device_flags() if flags is None else flags
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=comfyui,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, **os.environ},
            # A Ctrl-C in the terminal is for this program, which then stops the server.
            start_new_session=True,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        server.wait_until_ready(base, timeout)
        yield server
    finally:
        server.stop()
