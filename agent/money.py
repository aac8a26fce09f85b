"""Owns what proposals cost: the price table, upper bounds, and the caps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agent.researcher import after
from jobs.errors import UserError
from jobs.history import add_usage
from jobs.model import Unavailable, Usage
from jobs.settings import Prices

if TYPE_CHECKING:
    from jobs.history import State


# As published in November 2026, where thinking is output and `cache_write` is for an hour's life;
# agent.prices adds to it and overrides it.
PRICES: Mapping[str, Prices] = {
    "claude-opus-5-5": Prices(4.0, 20.0, 8.0, 0.2),
    "claude-opus-5": Prices(5.0, 25.0, 10.0, 0.5),
    "claude-sonnet-5-5": Prices(2.0, 10.0, 4.0, 0.1),
    "claude-haiku-5-5": Prices(0.1, 0.5, 0.2, 0.01),  # up to 100,000 tokens of input
}
LARGEST_REQUEST = 300_000  # bytes, about 100,000 tokens, to which one conversation may grow
AT_CAP_S = 60.0
PROPOSAL_CALLS = 4  # of the largest size: every third of 24 calls may break off
PROPOSAL_TOKENS = 1_000_000  # all replies of one proposal together


def price(settings: Any) -> Prices:
    """The price of the configured model.

    Raises UserError: the model is in neither table (the message says what to set).
    """
    given: Prices | None = settings.prices.get(settings.model)
    if given is not None:
        return given
    name = settings.model.rpartition("anthropic.")[2].partition("@")[0]  # Bedrock's and Vertex's
    if name not in PRICES:
        raise UserError(
            f"no price is known for {settings.model}; set agent.prices.{settings.model} to "
            f"{{input, output, cache_write, cache_read}} in dollars per million tokens"
        )
    return PRICES[name]


def usage(price: Prices, told: Any, *, output: int | None = None) -> Usage:
    """A reply's usage as the API `told` it. `output`: in its place, for a reply that broke off."""
    details = getattr(told, "output_tokens_details", None)
    booked = cost(
        price,
        told.input_tokens or 0,
        told.output_tokens or 0 if output is None else max(output, told.output_tokens or 0),
        told.cache_creation_input_tokens or 0,
        told.cache_read_input_tokens or 0,
        estimated=output is not None,
    )
    return replace(booked, thinking_tokens=details.thinking_tokens if details else 0)


def cost(
    price: Prices,
    fresh: int = 0,
    output: int = 0,
    write: int = 0,
    read: int = 0,
    estimated: bool = False,
) -> Usage:
    """Token counts as a Usage with its dollars."""
    dollars = (
        fresh * price.input
        + output * price.output
        + write * price.cache_write
        + read * price.cache_read
    ) / 1e6
    return Usage(fresh, output, write, read, dollars, estimated)


def bound(price: Prices, request_bytes: int, max_tokens: int) -> Usage:
    """The most that one call can cost: two bytes to a token, all of it written to the cache."""
    return cost(price, output=max_tokens, write=request_bytes // 2 + 1000, estimated=True)


def tokens(spent: Usage) -> int:
    """All tokens, however they were priced."""
    return (
        spent.input_tokens
        + spent.output_tokens
        + spent.cache_write_tokens
        + spent.cache_read_tokens
    )


def proposal(settings: Any) -> Usage:
    """The most that one proposal may cost: some calls of the largest size.

    Ordinary ones cost little; what takes room is replies that broke off, booked at their bound.
    """
    most = bound(price(settings), LARGEST_REQUEST, settings.max_tokens)
    return Usage(cache_read_tokens=PROPOSAL_TOKENS, dollars=PROPOSAL_CALLS * most.dollars)


def over_cap(state: State, branch: str, own: Any, campaign: Any) -> str | None:
    """In words, which cap the money spent and in flight exceeds: the branch's or the campaign's.

    Args:
        own, campaign: caps with dollars and tokens, None for no cap; `campaign` may be None.
    """
    return _exceeded((own, state.committed(branch)), (campaign, state.committed()))


def _exceeded(*capped: tuple[Any, Usage]) -> str | None:
    for caps, spent in capped:
        if caps is None:
            continue
        if caps.dollars is not None and spent.dollars > caps.dollars:
            return f"the cap of {caps.dollars:g} dollars leaves no room for a proposal"
        if caps.tokens is not None and tokens(spent) > caps.tokens:
            return f"the cap of {caps.tokens:,} tokens leaves no room for a proposal"
    return None


def at_cap(
    state: State, branch: str, settings: Any, campaign: Any, reserve: Usage
) -> Unavailable | None:
    """No proposal now, where `over_cap` says so; what is in flight may cost less than its reserve.

    No proposal any more where the branch is to end there, and money spent leaves no room as it is.
    """
    reason = over_cap(state, branch, settings.caps, campaign)
    if reason is None:
        return None
    own = add_usage(state.branch(branch).spent, reserve)
    spent = _exceeded((settings.caps, own), (campaign, add_usage(state.spent, reserve)))
    return Unavailable(reason, None if settings.at_cap == "end" and spent else after(AT_CAP_S))
