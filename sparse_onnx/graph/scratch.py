"""Where large temporary files go: TMPDIR, or else /var/tmp, since /tmp is often held in memory."""

from __future__ import annotations

import os
import tempfile

_LASTING = "/var/tmp"


def scratch_folder() -> str:
    """A folder that can be written to."""
    if "TMPDIR" not in os.environ and os.path.isdir(_LASTING) and os.access(_LASTING, os.W_OK):
        return _LASTING
    return tempfile.gettempdir()
