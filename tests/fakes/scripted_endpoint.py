"""An endpoint on loopback that answers by a script: chat completions and Bedrock's Converse, over HTTP.

`python -m tests.fakes.scripted_endpoint --seed 1` prints its port and serves until it is killed; GET /counts returns the
numbers of requests and answers. An answer depends only on the seed and the text of the request, so that two runs with the
same requests get the same answers in any order.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

TRANSIENT = ("rate_limit_seconds", "rate_limit_date", "server_error", "dropped", "hang")
LATER_ATTEMPTS_SUCCEED = 3


@dataclass
class Asked:
    """A request; `attempt` counts the same requests before it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    attempt: int

    @property
    def turns(self) -> list[str]:
        """The texts of the conversation."""
        contents = [message["content"] for message in self.body["messages"]]
        return [content if isinstance(content, str) else content[0]["text"] for content in contents]


@dataclass
class Response:
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    dropped: bool = False
    text: str | None = None


def completion(text: str | None, finish: str = "stop", tokens: tuple[int, int] = (50, 20), **message: Any) -> Response:
    """A response with a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    body = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return Response(body=body, text=text)


def converse(text: str, stop: str = "end_turn", tokens: tuple[int, int] = (50, 20)) -> Response:
    """A response of Bedrock's Converse."""
    body = {
        "output": {"message": {"role": "assistant", "content": [{"text": text}]}},
        "stopReason": stop,
        "usage": {"inputTokens": tokens[0], "outputTokens": tokens[1], "totalTokens": sum(tokens)},
        "metrics": {"latencyMs": 1},
    }
    return Response(body=body, text=text)


def error(status: int, message: str, code: str | None = None, **headers: str) -> Response:
    """An error response that fits both APIs."""
    body = {"error": {"message": message, "code": code}, "message": message}
    return Response(status, body, {**({"x-amzn-errortype": code} if code else {}), **headers})


def scripted(seed: int, faults: float, latency_s: tuple[float, float], hang_s: float) -> Callable[[Asked], Response]:
    """Answer with questions about the lamp that a passage names; a share `faults` of the requests gets a fault.

    Two thirds of the faults are transient and vary by attempt; at most three precede the answer. One third are faults of
    the answer, the same in each attempt: broken JSON or a wrong schema, often corrected in the next turn.
    """

    def answer(asked: Asked) -> Response:
        turns = asked.turns
        dice = random.Random(f"{seed} {asked.attempt} {turns}")
        delay = dice.uniform(*latency_s)
        if asked.attempt < LATER_ATTEMPTS_SUCCEED and dice.random() < faults * 2 / 3:
            fault = dice.choice(TRANSIENT)
            soon = format_datetime(datetime.now(UTC) + timedelta(seconds=1), usegmt=True)
            return {
                "rate_limit_seconds": error(429, "too many requests", **{"retry-after": "0.2"}),
                "rate_limit_date": error(429, "too many requests", **{"retry-after": soon}),
                "server_error": error(500, "something broke"),
                "dropped": Response(dropped=True),
                "hang": Response(delay_s=hang_s, dropped=True),
            }[fault]
        lamp = match[1] if (match := re.search(r"lamp (\w+)", turns[0])) else "none"
        dice = random.Random(f"{seed} {turns}")
        text = json.dumps({"instruction": f"Where does the lamp {lamp} stand?"})
        if dice.random() < (faults / 3 if len(turns) == 1 else faults):
            # Each turn has its own text, so that answers differ in their text.
            text = dice.choice([text[: -len(turns)], json.dumps({"question": f"Where is {lamp} {len(turns)}?"})])
        make = converse if asked.path.endswith("/converse") else completion
        response = make(text)
        response.delay_s = delay
        return response

    return answer


class ScriptedEndpoint:
    """Serves a script in a thread, on a free port, and counts requests and answers."""

    def __init__(self, script: Callable[[Asked], Response]) -> None:
        self.script = script
        self.requests: list[Asked] = []
        self.reset()

    def reset(self) -> None:
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.most_at_once = self.at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def counts(self) -> dict[str, Any]:
        """Numbers of requests, of answers by text, and of responses by status."""
        return {"asked": self.asked, "answered": self.answered, "statuses": self.statuses, "most": self.most_at_once}

    def __enter__(self) -> ScriptedEndpoint:
        self._loop = asyncio.new_event_loop()
        started = threading.Event()

        async def start() -> None:
            server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=2**22, backlog=512)
            self.port = server.sockets[0].getsockname()[1]
            started.set()

        def serve() -> None:
            self._loop.run_until_complete(start())
            self._loop.run_forever()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    self._loop.run_until_complete(task)
            self._loop.close()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._serve(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if method == "GET":
            response = Response(body=self.counts())
        else:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            response = await self._answer(path, headers, body)
            self.at_once -= 1
        if response.dropped:
            return False
        content = response.body if isinstance(response.body, bytes) else json.dumps(response.body).encode()
        lines = [f"HTTP/1.1 {response.status} -", "content-type: application/json", f"content-length: {len(content)}"]
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
        await writer.drain()
        return True

    async def _answer(self, path: str, headers: dict[str, str], body: bytes) -> Response:
        key = hashlib.sha256(path.encode() + body).hexdigest()
        asked = Asked(path, headers, json.loads(body), self.asked[key])
        self.asked[key] += 1
        self.requests.append(asked)
        response = self.script(asked)
        if response.delay_s:
            await asyncio.sleep(response.delay_s)
        self.statuses["dropped" if response.dropped else str(response.status)] += 1
        if response.text is not None:
            self.answered[response.text] += 1
        return response


def main() -> None:
    """Serve until the process is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=float, default=0.3)
    parser.add_argument("--latency", type=float, nargs=2, default=(0.01, 0.03))
    parser.add_argument("--hang", type=float, default=10.0)
    arguments = parser.parse_args()
    with ScriptedEndpoint(
        scripted(arguments.seed, arguments.faults, tuple(arguments.latency), arguments.hang)
    ) as endpoint:
        print(endpoint.port, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
