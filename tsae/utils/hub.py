"""Whether the Hugging Face hub can be reached."""

from __future__ import annotations

_TIMEOUT = 10.0  # seconds


def hub_is_reachable() -> bool:
    """Whether the hub answers within about ten seconds; False if HF_HUB_OFFLINE is set.

    Asking once first lets a machine without network fail, or use its cache, at once: the hub's own client retries
    each file for half a minute.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)  # any answer counts, even an error
    except Exception:  # from whichever HTTP library this version of the client uses
        return False
    return True
