"""What configurations of transformers name in one of several ways."""

from __future__ import annotations

from typing import Any


def setting(config: Any, names: tuple[str, ...], *, deep: bool = True) -> Any:
    """The first of these that the configuration, or one in it, sets."""
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    for part in getattr(config, "sub_configs", {}) if deep else ():
        value = setting(getattr(config, part), names)
        if value is not None:
            return value
    return None
