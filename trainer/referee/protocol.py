"""The words that train.py's side and the referee exchange: frames, message names, limits.

A frame is a little-endian uint32 length and that many bytes of one JSON object in UTF-8. Bulk data
(token rows, losses) lies in the shared file, frames only say where. PROTOCOL.md tells the story.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

VERSION = 1
MAX_FRAME = 64 * 1024  # bytes
MAX_SLOT = 256 * 2**20  # bytes of one batch of rows in the shared file; losses may take twice that
SOCKET_NAME = "socket"
RING_NAME = "ring"

# What a client may declare in its hello. An auditing referee (protocol 1 or later) will refuse a
# client that lacks the feature it needs, so that no client meets a message it cannot answer.
FEATURES = ("feed", "score", "log")

# Named now, used by the audit of a later version; a referee of version 1 refuses them in words.
RESERVED = frozenset({"logits", "twins", "audit", "repeat"})

REQUESTS = frozenset({"next", "score", "answer", "log"})

MAX_LOG_KEYS = 32
MAX_LOG_KEY = 64  # characters
MAX_LOG_TEXT = 200  # characters


class Garbage(ValueError):
    """What came over the socket is not a frame of this protocol. The sender cannot be served."""


class Refused(ValueError):
    """The referee understood and declined. The session goes on."""


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Send one frame.

    Raises:
        ValueError: larger than MAX_FRAME, or a number that JSON lacks (NaN, infinity).
        OSError: the other side is gone.
    """
    body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME:
        raise ValueError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME}")
    connection.sendall(len(body).to_bytes(4, "little") + body)


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """The next frame, or None when the other side closed between two frames.

    Raises:
        Garbage: an oversize or cut frame, no JSON object, or one without a "type".
    """
    head = _read(connection, 4)
    if not head:
        return None
    length = int.from_bytes(head, "little")
    if len(head) < 4 or length > MAX_FRAME:
        raise Garbage(f"a frame says it holds {length} bytes, the limit is {MAX_FRAME}")
    body = _read(connection, length)
    if len(body) < length:
        raise Garbage(f"a frame of {length} bytes broke off after {len(body)}")
    try:
        message = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Garbage(f"a frame holds no JSON: {error}"[:200]) from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise Garbage('a frame holds no JSON object with a "type"')
    return message


def whole(message: Mapping[str, Any], key: str) -> int:
    """The positive integer under `key`. Raises Garbage if it is anything else."""
    value = message.get(key)
    if type(value) is not int or not 0 < value < 2**40:
        raise Garbage(f'"{message["type"]}" needs a positive integer "{key}", got {value!r:.60}')
    return value


def seconds(value: Any) -> float | None:
    """A plausible duration that a program claims, else None."""
    return float(value) if type(value) in (int, float) and 0 <= value < 1e9 else None


def check_metrics(metrics: Any) -> dict[str, float | str | None]:
    """Telemetry as it may be stored: short keys; finite numbers, None or short strings.

    Raises:
        Refused: in words, what is not so.
    """
    if not isinstance(metrics, dict) or len(metrics) > MAX_LOG_KEYS:
        raise Refused(f"log takes up to {MAX_LOG_KEYS} named values at a time")
    for key, value in metrics.items():
        if not isinstance(key, str) or not 0 < len(key) <= MAX_LOG_KEY:
            raise Refused(f"log: a name has 1 to {MAX_LOG_KEY} characters, got {key!r:.80}")
        if value is None or (isinstance(value, str) and len(value) <= MAX_LOG_TEXT):
            continue
        if not isinstance(value, int | float) or not abs(value) <= 1e300:  # NaN compares as False
            raise Refused(
                f"log: {key} must be a finite number or at most {MAX_LOG_TEXT} characters of text,"
                f" got {value!r:.80}"
            )
    return metrics


def _read(connection: socket.socket, count: int) -> bytes:
    """`count` bytes, or fewer when the other side closed."""
    data = connection.recv(count)
    while data and len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            break
        data += more
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
