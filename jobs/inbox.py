"""Orders to a running campaign: files renamed into inbox/, recorded by the controller."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.errors import UserError

ORDERS = ("stop", "tell", "pause", "resume", "retire", "add", "adopt")
TEXTS = ("order", "branch", "text", "experiment", "into")  # beside these: settings
LARGEST = 65_536  # bytes; an order is a sentence, not a file
NOTE = 4000  # characters of what a researcher is told


def note(text: str) -> str:
    """What a researcher is told, whole. Raises UserError: it is too long for a digest."""
    if len(text) > NOTE:
        raise UserError(f"a note has at most {NOTE} characters, this one has {len(text)}")
    return text


def send(campaign_dir: Path, order: str, **details: Any) -> str:
    """Leave an order for the controller; returns its name. It is seen whole or not at all."""
    inbox = campaign_dir / "inbox"
    inbox.mkdir(exist_ok=True)
    name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"  # in the order they were given
    draft = inbox / f".{name}"
    draft.write_text(json.dumps({"order": order, **details}))
    os.rename(draft, inbox / f"{name}.json")
    return name


def given(path: Path) -> float:
    """When an order was given, seconds since the epoch; infinite where its name does not say."""
    began = path.stem.partition("-")[0]
    return int(began) / 1e9 if began.isdecimal() else math.inf


def waiting(campaign_dir: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The orders that lie there, oldest first; what is no order is {"order": "", "why": ...}."""
    for path in sorted((campaign_dir / "inbox").glob("[!.]*.json")):
        try:
            with open(path, "rb") as file:
                content = _order(json.loads(file.read(LARGEST)))
        except (OSError, ValueError, RecursionError) as error:
            content = {"order": "", "why": str(error)[:200]}
        yield path, content


def _order(content: Any) -> dict[str, Any]:
    """What the ledger may record of an order. Raises ValueError: it is none."""
    if not isinstance(content, dict) or content.get("order") not in ORDERS:
        raise ValueError(f"an order is one of {', '.join(ORDERS)}")
    order: dict[str, Any] = {key: str(content[key]) for key in TEXTS if key in content}
    if settings := content.get("settings"):
        if not isinstance(settings, dict):
            raise ValueError("an order's settings are a mapping")
        json.dumps(settings, allow_nan=False)
        order["settings"] = settings
    return order
