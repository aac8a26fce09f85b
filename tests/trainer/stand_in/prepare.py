"""Stands in for trainer/prepare.py where train.py is tested alone: bytes as tokens, no referee.

The text is the interpreter's own standard library; the budget is BUDGET steps of 8 x 256 tokens.
"""

import inspect
import math
import os
import string
import textwrap
import typing

import torch

SCALE, SEED, MAX_SEQ_LEN = "cpu", 1, 256
BUDGET = int(os.environ.get("BUDGET_TOKENS", "40960"))
VOCABULARY = 257  # bytes, and one that begins every row
LOGGED: list[dict] = []  # what log() was told
_served = 0


class Tokenizer:
    @classmethod
    def from_directory(cls):
        return cls()

    def get_vocab_size(self):
        return VOCABULARY


def rows(module, length):
    """(n, length + 1) of int64: the source text of a module, cut into rows."""
    text = torch.tensor(list(inspect.getsource(module).encode()))
    text = text[: len(text) // length * length].view(-1, length)
    return torch.cat([torch.full((len(text), 1), 256), text], dim=1)


def progress():
    return min(1.0, _served / BUDGET)


def log(**metrics):
    LOGGED.append(metrics)


def make_dataloader(tokenizer, B, T, split):
    global _served
    data, at = rows(typing, T), 0
    while True:
        index = torch.arange(at, at + B) % len(data)
        at, _served = at + B, _served + B * T
        yield data[index, :-1], data[index, 1:], 1 + at // len(data)


@torch.no_grad()
def evaluate_bpb(model, tokenizer, batch_size, length=MAX_SEQ_LEN):
    data = torch.cat([rows(module, length) for module in (string, textwrap)])
    losses = [model(part[:, :-1], part[:, 1:], reduction="none") for part in data.split(batch_size)]
    return torch.cat(losses).mean().item() / math.log(2)
