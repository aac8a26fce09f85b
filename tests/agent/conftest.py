"""The key that the researchers find, as a user would give it."""

from __future__ import annotations

import pytest
import server


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", server.KEY)
    monkeypatch.delenv("ANTHROPIC_AUTH_TOKEN", raising=False)
