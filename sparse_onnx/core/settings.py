"""Options in text, as the command line takes them."""

from __future__ import annotations


def parse_settings(text: str) -> tuple[str, dict[str, str]]:
    """``NAME:option=value,option=value`` as (NAME, {option: value}).

    Raises:
        ValueError: another form.
    """
    name, _, rest = text.partition(":")
    settings: dict[str, str] = {}
    for setting in filter(None, rest.split(",")):
        option, equals, value = setting.partition("=")
        if not (option and equals):
            raise ValueError(f"'{text}' is not NAME:option=value,option=value")
        settings[option] = value
    if not name:
        raise ValueError(f"'{text}' is not NAME:option=value,option=value")
    return name, settings
