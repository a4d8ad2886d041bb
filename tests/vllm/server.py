"""vLLM's OpenAI server on the loopback, in a process of its own, and requests to it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eah.vllm import engine_args, flags

from .asks import THRESHOLD, Ask
from .engine import ENVIRONMENT
from .models import picture

ROOT = Path(__file__).parents[2]
SECONDS = 400  # that a server may take to start


class Server:
    def __init__(self, url: str):
        self.url = url

    def post(self, path: str, body: dict[str, Any], seconds: float = 120):
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return json.load(answer)

    def chat(self, ask: Ask, **more) -> dict[str, Any]:
        """prompt and tokens of an answer, both as token ids."""
        answer = self.post("/v1/chat/completions", {**body_of(ask), **more})
        choice = answer["choices"][0]
        return {"prompt": answer["prompt_token_ids"], "tokens": choice["token_ids"], "id": answer["id"]}

    def cancelled(self, ask: Ask, seconds: float) -> None:
        """Asks, and hangs up after so long."""
        host, port = self.url.removeprefix("http://").split(":")
        data = json.dumps({**body_of(ask), "stream": True}).encode()
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(data) + data
            )
            time.sleep(seconds)

    def reports(self) -> list[dict[str, Any]]:
        return self.post("/collective_rpc", {"method": "eah_report"})["results"]

    def counted(self) -> dict[str, float]:
        """eah_prompts_total by outcome, of all processes."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=60) as answer:
            lines = re.findall(r'^eah_prompts_total{outcome="(\w+)".*} (\S+)$', answer.read().decode(), re.M)
        return {outcome: float(number) for outcome, number in lines}


def body_of(ask: Ask) -> dict[str, Any]:
    seeds, content = list(ask.seeds), []
    for part in filter(None, re.split("(I)", ask.text)):
        if part == "I":
            with io.BytesIO() as png:
                picture(seeds.pop(0)).save(png, "PNG")
                url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        else:
            content.append({"type": "text", "text": part})
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": ask.tokens, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True, "add_generation_prompt": False}
    return body if ask.eah is None else {**body, "vllm_xargs": {"eah": ask.eah}}


@contextmanager
def serving(folder: Path, scratch: Path, *options: str, plugin: bool = True):
    """A `Server`; its log is scratch/server.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (scratch / "metrics").mkdir()
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    environment |= {"PROMETHEUS_MULTIPROC_DIR": str(scratch / "metrics"), "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    command = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-num-seqs",
        "16",
    ]
    command += ["--max-model-len", "512", *options, *(flags(engine_args(threshold=THRESHOLD)) if plugin else [])]
    with open(scratch / "server.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        server = Server(f"http://127.0.0.1:{port}")
        _wait(server, process, scratch / "server.log")
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(server: Server, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(server.url + "/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")
