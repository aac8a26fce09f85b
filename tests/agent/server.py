"""A stand-in for the Messages API over real HTTP: streams replies, injects faults, counts tokens.

The unmodified SDK talks to it. What it answers is a `player`'s business: a function of the request
that returns a `Reply`. What goes wrong is a `fault`'s: a function of the call's number.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

THINKING = 7  # tokens of each reply
MODEL = "claude-opus-5-5"
PRICE = {"input": 4.0, "output": 20.0, "write": 8.0, "read": 0.2}  # dollars per million tokens
KEY = f"sk-ant-test-{secrets.token_hex(8)}"  # none that other tests beside these hold
STATUS = {"529": 529, "500": 500, "429": 429, "429-absurd": 429, "spend": 429, "402": 402}
STATUS |= {"401": 401, "400": 400}
FAULTS = ("529", "500", "429", "mid-stream-error", "chunked-drop", "clean-drop", "hang")
FAULTS += ("no-message-stop", "garbage", "empty", "prose", "max-tokens", "reset")


@dataclass(frozen=True)
class Reply:
    """What the model says: blocks as the API writes them."""

    blocks: tuple[dict[str, Any], ...]
    stop: str = "tool_use"


def say(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def think(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": f"signed({text})"}


def use(tool: str, **given: Any) -> dict[str, Any]:
    name = hashlib.sha256(json.dumps([tool, given]).encode()).hexdigest()[:12]
    return {"type": "tool_use", "id": f"toolu_{name}", "name": tool, "input": given}


def edit(**given: Any) -> dict[str, Any]:
    return use("str_replace_based_edit_tool", **given)


def submit(description: str, *tags: str) -> dict[str, Any]:
    return use("submit", hypothesis="it helps", description=description, tags=list(tags or ["x"]))


def step(request: dict[str, Any]) -> int:
    """How many tool calls this conversation has had answered."""
    blocks = [block for message in request["messages"] for block in message["content"]]
    return sum(1 for block in blocks if block["type"] == "tool_result")


def last_result(request: dict[str, Any]) -> str:
    """The answer to the latest tool call."""
    return next(
        block["content"]
        for message in reversed(request["messages"])
        for block in reversed(message["content"])
        if block["type"] == "tool_result"
    )


def text_of(request: dict[str, Any]) -> str:
    """Everything that the request says, as one text."""
    return json.dumps([request.get("system"), request["messages"]], ensure_ascii=False)


@dataclass
class Call:
    """One request and how it was charged."""

    request: dict[str, Any]
    headers: dict[str, str]
    fault: str | None
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def dollars(self) -> float:
        return sum(self.counts.get(kind, 0) * PRICE[kind] for kind in PRICE) / 1e6


class Server:
    """Use as a context manager; `url` is what base_url must be."""

    def __init__(
        self,
        player: Callable[[dict[str, Any]], Reply],
        fault: Callable[[int], str | None] = lambda number: None,
        latency: float = 0.0,
    ) -> None:
        self.player, self.fault, self.latency = player, fault, latency
        self.calls: list[Call] = []
        self.invalid: list[AssertionError] = []  # requests that the real API would refuse
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._cached: set[str] = set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    server._answer(self, json.loads(body))

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> Server:
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()
        if self.invalid:
            raise self.invalid[0]

    @property
    def dollars(self) -> float:
        """What all calls cost by the server's own count."""
        return sum(call.dollars for call in self.calls)

    # -- one call ---------------------------------------------------------------------------------

    def _answer(self, http: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        try:
            _validate(request)
        except AssertionError as error:  # on the SDK's side this is only a dropped connection
            self.invalid.append(error)
            raise
        with self.lock:
            fault = self.fault(len(self.calls))
            call = Call(request, dict(http.headers.items()), fault)
            self.calls.append(call)
        time.sleep(self.latency)
        if fault in STATUS:
            _refuse(http, fault)
        elif fault == "reset":
            self._count(call, 0)  # it was received, and may have been worked on
            http.close_connection = True
            http.connection.shutdown(socket.SHUT_RDWR)
        else:
            self._stream(http, call, fault)

    def _stream(self, http: BaseHTTPRequestHandler, call: Call, fault: str | None) -> None:
        reply = _spoiled(self.player(call.request), fault)
        output = len(json.dumps(reply.blocks)) // 3 + 10
        self._count(call, output)
        events = list(_events(reply, call, output))
        clean = fault == "clean-drop"
        http.send_response(200)
        http.send_header("Content-Type", "text/event-stream")
        framing = ("Connection", "close") if clean else ("Transfer-Encoding", "chunked")
        http.send_header(*framing)
        http.end_headers()
        http.close_connection = clean
        cut = fault in ("mid-stream-error", "chunked-drop", "clean-drop", "hang", "garbage")
        kept = events[: max(2, len(events) * 2 // 3)] if cut else events
        if fault == "no-message-stop":
            kept = events[:-1]
        for name, data in kept:
            _write(http, f"event: {name}\ndata: {json.dumps(data)}\n\n", clean)
        if fault == "mid-stream-error":
            error = {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}
            _write(http, f"event: error\ndata: {json.dumps(error)}\n\n", clean)
        if fault == "garbage":
            _write(http, "event: content_block_delta\ndata: {not json at all\n\n", clean)
        if fault == "hang":
            self.closing.wait(60)
        if fault in ("chunked-drop", "hang"):
            http.close_connection = True
            http.connection.shutdown(socket.SHUT_RDWR)
        elif not clean:
            http.wfile.write(b"0\r\n\r\n")

    def _count(self, call: Call, output: int) -> None:
        """Tokens, by the rule of prompt caching: the longest known prefix is read, the rest up to
        the last breakpoint is written, what follows is fresh."""
        size, last, read, digest = 0, 0, 0, hashlib.sha256()
        with self.lock:
            for block in _prompt(call.request):
                marked = block.pop("cache_control", None)
                text = json.dumps(block, sort_keys=True)
                digest.update(text.encode())
                size += len(text)
                if marked:
                    assert marked == {"type": "ephemeral", "ttl": "1h"}
                    last, name = size, digest.hexdigest()
                    read = size if name in self._cached else read
                    self._cached.add(name)
        whole, read, last = size // 4, read // 4, last // 4
        counts = {"input": whole - last, "write": last - read, "read": read, "output": output}
        call.counts = counts


def _prompt(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"tools": request["tools"]}
    for block in request["system"]:
        yield dict(block)
    for message in request["messages"]:
        for block in message["content"]:
            yield {"role": message["role"], **block}


def _validate(request: dict[str, Any]) -> None:
    """What the real API refuses with status 400: the tests fail loudly instead."""
    assert request["stream"] is True
    assert request["messages"][0]["role"] == "user"
    assert not {"temperature", "top_p", "top_k"} & request.keys()
    marks = sum("cache_control" in block for block in _prompt(request))
    assert marks <= 4, f"{marks} cache breakpoints"
    asked: list[str] = []
    for before, message in zip([None, *request["messages"]], request["messages"], strict=False):
        assert message["content"], "empty content"
        assert before is None or before["role"] != message["role"], "roles do not alternate"
        answered = [b["tool_use_id"] for b in message["content"] if b["type"] == "tool_result"]
        assert answered == asked, "every tool call needs its result, in the next message"
        asked = [b["id"] for b in message["content"] if b["type"] == "tool_use"]
        for block in message["content"]:
            assert block.get("text") != "", "empty text"
            allowed = {"type", "text", "id", "name", "input", "thinking", "signature"}
            allowed |= {"tool_use_id", "content", "is_error", "cache_control"}
            assert block.keys() <= allowed, block.keys() - allowed
            if block["type"] == "thinking":
                assert block["signature"] == f"signed({block['thinking']})"


def _refuse(http: BaseHTTPRequestHandler, fault: str) -> None:
    kinds = {"529": "overloaded_error", "500": "api_error", "402": "billing_error"}
    kinds |= {"401": "authentication_error", "400": "invalid_request_error"}
    error: dict[str, Any] = {
        "type": kinds.get(fault, "rate_limit_error"),
        "message": f"{fault}: you sent {http.headers.get('authorization')}",
    }
    if fault == "spend":
        error["details"] = {"error_code": "enforced_spend_limit_reached"}
    body = json.dumps({"type": "error", "error": error}).encode()
    http.send_response(STATUS[fault])
    if fault.startswith("429"):
        http.send_header("Retry-After", "1209600" if fault == "429-absurd" else "0.05")
    http.send_header("Content-Type", "application/json")
    http.send_header("Content-Length", str(len(body)))
    http.end_headers()
    http.wfile.write(body)


def _spoiled(reply: Reply, fault: str | None) -> Reply:
    if fault == "empty":
        return Reply((), "end_turn")
    if fault == "prose":
        return Reply((say("I would rather tell you about my idea."),), "end_turn")
    if fault == "max-tokens":
        return Reply(reply.blocks, "max_tokens")
    return reply


def _events(reply: Reply, call: Call, output: int) -> Iterator[tuple[str, dict[str, Any]]]:
    counts = call.counts
    usage = {
        "input_tokens": counts["input"],
        "cache_creation_input_tokens": counts["write"],
        "cache_read_input_tokens": counts["read"],
        "output_tokens": 1,
    }
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": MODEL}
    message |= {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
    yield "message_start", {"type": "message_start", "message": message}
    yield "ping", {"type": "ping"}
    for index, block in enumerate(reply.blocks):
        last = index == len(reply.blocks) - 1
        yield from _block_events(index, block, cut=last and reply.stop == "max_tokens")
    delta = {"stop_reason": reply.stop, "stop_sequence": None}
    told = {"output_tokens": output, "output_tokens_details": {"thinking_tokens": THINKING}}
    end = {"type": "message_delta", "delta": delta, "usage": told}
    yield "message_delta", end
    yield "message_stop", {"type": "message_stop"}


def _block_events(
    index: int, block: dict[str, Any], cut: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = block["type"]
    empty = {"text": "", "thinking": "", "signature": "", "input": {}}
    start = {key: empty.get(key, value) for key, value in block.items()}
    yield _event("content_block_start", index, content_block=start | {"type": kind})
    if kind == "tool_use":
        text = json.dumps(block["input"])
        parts = [text[n : n + 40] for n in range(0, len(text), 40)]
        for part in parts[: max(1, len(parts) // 2)] if cut else parts:
            delta = {"type": "input_json_delta", "partial_json": part}
            yield _event("content_block_delta", index, delta=delta)
    else:
        delta = {"type": f"{kind}_delta", kind: block[kind]}
        yield _event("content_block_delta", index, delta=delta)
        if "signature" in block:
            delta = {"type": "signature_delta", "signature": block["signature"]}
            yield _event("content_block_delta", index, delta=delta)
    yield _event("content_block_stop", index)


def _event(name: str, index: int, **rest: Any) -> tuple[str, dict[str, Any]]:
    return name, {"type": name, "index": index, **rest}


def _write(http: BaseHTTPRequestHandler, text: str, plain: bool) -> None:
    data = text.encode()
    http.wfile.write(data if plain else b"%x\r\n%s\r\n" % (len(data), data))
    http.wfile.flush()
