"""Asks a vLLM server about a picture, with EAH and without it: python examples/vllm_client.py URL PICTURE QUESTION.

docs/vllm.md says how the server is started. Nothing but Python is needed here.
"""

import base64
import json
import sys
from mimetypes import guess_type
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

DEFAULTS = ["http://localhost:8000", "", "What is in the picture?"]
URL, PICTURE, QUESTION = sys.argv[1:4] + DEFAULTS[len(sys.argv) - 1 :]
URL = URL.rstrip("/")


def ask(eah: str) -> str:
    content = [{"type": "text", "text": QUESTION}]
    if PICTURE:
        with open(PICTURE, "rb") as file:
            data = base64.b64encode(file.read()).decode()
        url = f"data:{guess_type(PICTURE)[0] or 'image/png'};base64,{data}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 64, "temperature": 0}
    body["vllm_xargs"] = {"eah": eah}  # without it, the server's default
    request = Request(f"{URL}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


try:
    print("with EAH:   ", ask("on"))
    print("without EAH:", ask("off"))
except HTTPError as error:
    print(f"{URL} answers {error}: {error.read().decode()}")
except URLError as error:
    print(f"no answer from {URL}: {error}; docs/vllm.md says how a server is started")
