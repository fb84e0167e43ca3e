"""Whether the hub is reachable: any answer counts, and offline mode asks nobody."""

from __future__ import annotations

import pytest

from tsae.utils import hub


def test_offline_mode_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, utils

    monkeypatch.setattr(utils, "get_session", lambda: pytest.fail("asked the network"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.hub_is_reachable()


def test_any_answer_means_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, utils

    class Session:
        def head(self, url: str, timeout: float) -> None:
            assert url == constants.ENDPOINT
            assert timeout <= 10

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(utils, "get_session", Session)
    assert hub.hub_is_reachable()
