"""Owns exchanges with the Messages API: a complete reply, or a failure, its class and cost."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import anthropic
import httpx2

from agent import keys, money
from agent.researcher import Context, after
from jobs.model import Usage

LONGEST_WAIT_S = 60.0  # between two tries, whatever Retry-After says
RETURN_S = 120.0  # until the model is asked again after an outage
LONGEST_RETURN_S = 3600.0
PERSON_S = 900.0  # the same after trouble that a person must end (key, spending limit)
PASSING = ("overloaded_error", "api_error", "rate_limit_error", "timeout_error")
# What is wrong on this side of the wire: a package, a header, an address.
LOCAL = (ImportError, httpx2.LocalProtocolError, httpx2.UnsupportedProtocol, httpx2.InvalidURL)
PASSING_STATUS = (408, 409, 425, 429)


class Stopped(Exception):
    """The model will not answer now: `reason` for people, `until` as in Unavailable."""

    def __init__(self, reason: str, until: str | None) -> None:
        super().__init__(reason)
        self.reason, self.until = reason, until


@dataclass(frozen=True)
class Failure:
    """Why one call failed."""

    reason: str
    passing: bool  # worth trying again; else a person is needed
    retry_after: float | None = None  # seconds, as the server said
    sent: bool = True  # False: it certainly cost nothing
    usage: Usage = field(default_factory=Usage)  # at most


@dataclass(frozen=True)
class Reply:
    """A complete reply."""

    message: Any  # anthropic.types.Message
    usage: Usage


def client(settings: Any, silence_s: float) -> Any:
    """The SDK's client, without its retries: they would honour a Retry-After of weeks.

    Raises KeyUnusable: no key, or a key file that others can read.
    """
    if settings.provider == "bedrock":
        return anthropic.AnthropicBedrock(base_url=settings.base_url, max_retries=0)
    if settings.provider == "vertex":
        return anthropic.AnthropicVertex(base_url=settings.base_url, max_retries=0)
    return anthropic.Anthropic(
        **keys.load(settings.key_file),  # type: ignore[arg-type]
        base_url=settings.base_url,
        max_retries=0,
        timeout=httpx2.Timeout(silence_s, connect=min(30.0, silence_s)),
    )


def failure(error: BaseException) -> Failure:
    """The class of an exception out of the SDK, by status and by type."""
    if not isinstance(error, anthropic.APIStatusError):
        cause = error.__cause__
        what = f"{type(error).__name__}: {cause or error}"[:300]
        # The SDK's own, but not of an exchange with the API: no region, no key.
        own = isinstance(error, anthropic.AnthropicError)
        own = own and not isinstance(error, anthropic.APIError)
        if isinstance(error, LOCAL) or isinstance(cause, LOCAL) or own:
            return Failure(f"the request cannot be sent from here ({what})", False, sent=False)
        refused = isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout)
        return Failure(f"the connection broke ({what})", True, sent=not refused)
    kind, status = error.type or "", error.status_code
    said = f"{status} {kind}: {error.api_message or error.message}"[:300]
    sent = status < 400  # a mid-stream error comes with status 200
    if "spend_limit" in (error.error_code or "") or status == 402 or kind == "billing_error":
        return Failure(f"the API's spending limit is reached ({said})", False, sent=sent)
    if status in (401, 403) or kind in ("authentication_error", "permission_error"):
        return Failure(f"the API does not accept the key ({said})", False, sent=sent)
    if kind in PASSING or status >= 500 or status in PASSING_STATUS:
        wait = _seconds(error.response.headers.get("retry-after"))
        return Failure(f"the API is not available ({said})", True, wait, sent)
    return Failure(f"the API refuses the request ({said})", False, sent=sent)


def _seconds(header: str | None) -> float | None:
    try:
        return max(float(header or ""), 0.0)
    except ValueError:
        return None  # a date, or nonsense: our own pace will do


class Model:
    """A model behind the API. Shared by all slots: what one learns of an outage, all know."""

    def __init__(self, settings: Any, silence_s: float = 120.0, pace_s: float = 1.0) -> None:
        """`silence_s`: a stream this long without a byte hangs; `pace_s`: the first wait."""
        self.settings = settings
        self.price = money.price(settings)
        self._silence_s = min(silence_s, max(settings.outage_patience, 1.0))
        self._pace_s = pace_s
        self._lock = threading.Lock()
        self._client: Any = None
        self._failing_since: float | None = None

    def ask(
        self,
        request: Mapping[str, Any],
        afford: Callable[[Mapping[str, Any]], None],
        spend: Callable[[Usage], None],
        context: Context,
        deadline: float,
    ) -> Reply:
        """A complete reply to `request`, through passing trouble.

        Args:
            afford: raises Stopped where the next try could cost too much.
            spend: told of the cost of each try.
            context: told before each sleep what is waited for; gives up within a second of its
                stop.
            deadline: of the whole proposal, on the monotonic clock.

        Raises:
            Stopped: the outage outlasted `outage_patience`, or a person is needed, or `stop`.
        """
        attempt, stop = 0, context.stop
        while True:
            began = time.monotonic()
            if began > deadline:
                raise Stopped("the proposal took longer than agent.deadline", after(1))
            afford(request)
            outcome = self._once(request, stop, deadline)
            spend(outcome.usage)
            if isinstance(outcome, Reply):
                self._failing_since = None
                return outcome
            if stop.is_set():
                raise Stopped("stopping", None)
            if not outcome.passing:
                self._client = None  # a new key is read at the next try
                raise Stopped(outcome.reason, after(PERSON_S))
            wait = self._wait(outcome, attempt, began)
            context.say(f"waiting {wait:.0f} s: {outcome.reason}")
            if stop.wait(wait):
                raise Stopped("stopping", None)
            attempt += 1

    def _wait(self, failed: Failure, attempt: int, began: float) -> float:
        """Seconds until the next try, the last one as the patience ends; Stopped beyond it."""
        with self._lock:
            since = self._failing_since = self._failing_since or began
        left: float = since + self.settings.outage_patience - time.monotonic()
        told = failed.retry_after or 0.0
        if left <= 0 or told > left:
            raise Stopped(failed.reason, after(min(max(told, RETURN_S), LONGEST_RETURN_S)))
        pace: float = self._pace_s * 2 ** min(attempt, 10) * random.uniform(0.5, 1.0)
        return min(max(pace, told), left, LONGEST_WAIT_S)

    def _once(
        self, request: Mapping[str, Any], stop: threading.Event, deadline: float
    ) -> Reply | Failure:
        try:
            with self._lock:
                self._client = self._client or client(self.settings, self._silence_s)
        except (ValueError, ImportError, anthropic.AnthropicError) as error:  # no key, no region
            return Failure(str(error), passing=False)
        call = _Call(self._client, request)
        call.start()
        while not call.done.wait(0.05) and not stop.is_set() and time.monotonic() < deadline:
            pass
        if call.message is not None:
            return Reply(call.message, money.usage(self.price, call.message.usage))
        failed = failure(call.error or TimeoutError("abandoned before the reply was complete"))
        secrets = [getattr(call.client, name, None) or "" for name in ("api_key", "auth_token")]
        reason = keys.scrub(failed.reason, *secrets)
        return replace(failed, reason=reason, usage=self._at_most(request, call, failed))

    def _at_most(self, request: Mapping[str, Any], call: _Call, failed: Failure) -> Usage:
        """The upper bound of a reply that broke off: what was streamed is not all that was made."""
        if call.told is not None:
            return money.usage(self.price, call.told, output=request["max_tokens"])
        if not failed.sent:
            return Usage()
        size = len(json.dumps(request, default=str).encode())
        return money.bound(self.price, size, request["max_tokens"])


class _Call(threading.Thread):
    """One streaming request on a thread of its own, so that a hanging one can be left behind."""

    def __init__(self, client: Any, request: Mapping[str, Any]) -> None:
        super().__init__(daemon=True, name="messages-api")
        self.client, self._request = client, request
        self.done = threading.Event()
        self.told: Any = None  # usage from message_start
        self.message: Any = None  # only if it is complete
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.message = self._read()
        except Exception as error:  # the SDK raises its own, httpx2's, ValueError, AssertionError
            self.error = error
        finally:
            self.done.set()

    def _read(self) -> Any:
        stopped = False
        inputs: dict[int, str] = {}
        with self.client.messages.stream(**self._request) as stream:
            for event in stream:
                if event.type == "message_start":
                    self.told = event.message.usage
                elif event.type == "content_block_delta" and event.delta.type == "input_json_delta":
                    text = inputs.get(event.index, "") + event.delta.partial_json
                    inputs[event.index] = text
                elif event.type == "message_stop":
                    stopped = True
            message = stream.get_final_message()
        # A connection that closes cleanly in mid-reply raises nothing.
        if not stopped or message.stop_reason is None:
            raise ConnectionError("the reply ended before it was complete")
        for text in inputs.values():
            if message.stop_reason != "max_tokens":
                json.loads(text or "{}")  # the SDK also takes JSON that is cut off
        return message
