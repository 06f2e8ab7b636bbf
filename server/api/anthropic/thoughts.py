"""The signatures of thoughts. Anthropic's hold a thought encrypted, so that one that a client does not want to see
comes back all the same. No thought here is secret, so ours hold it in plain.
"""

import base64

from server.errors import InvalidRequest

SIGNATURE = "turbocache"
"""Of a thought that is shown. It says nothing, but clients drop a thought that has no signature."""
_HOLDS = f"{SIGNATURE}:"


def signature_of(hidden: str) -> str:
    """The signature that holds a thought which is not shown."""
    return _HOLDS + base64.b64encode(hidden.encode()).decode()


def hidden_in(signature: str) -> str:
    """The thought that a signature holds, empty for others' signatures. Raises InvalidRequest for a damaged one."""
    if not signature.startswith(_HOLDS):
        return ""
    try:
        return base64.b64decode(signature.removeprefix(_HOLDS), validate=True).decode()
    except ValueError as error:
        raise InvalidRequest("A thinking block's signature was changed on its way.", param="messages") from error
