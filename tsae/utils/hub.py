"""Whether the Hugging Face hub can be reached."""

from __future__ import annotations

from tsae.errors import UserError

_TIMEOUT = 10.0  # seconds


def hub_is_reachable() -> bool:
    """Whether the hub answers within about ten seconds; False if HF_HUB_OFFLINE is set.

    Asking once first lets a machine without network fail, or use its cache, at once: the hub's own client retries
    each file for half a minute.

    Raises:
        UserError: the client would keep its files in a folder `~`, because there is no home directory.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # not in its list of exports

    if constants.HF_HUB_OFFLINE:
        return False
    if str(constants.HF_HUB_CACHE).startswith("~"):
        raise UserError(
            f"The Hugging Face hub's files cannot be kept in {constants.HF_HUB_CACHE}, which is in no home directory; "
            "set HF_HOME to a folder."
        )
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)  # any answer counts, even an error
    except Exception:  # from whichever HTTP library this version of the client uses
        return False
    return True
