"""Write plain values as the YAML that OmegaConf writes, each scalar once."""

import re
from typing import Any

from omegaconf import OmegaConf

# Texts that are kept.
_MOST_TEXTS = 10_000
_WIDTH = 80  # PyYAML breaks a longer line at a space
_LONGEST_KEY = 100  # PyYAML writes one of 128 characters in another way
# Paths and overrides, which YAML writes as they are: no number, date, boolean or null is like them.
_AS_IT_IS = re.compile(r"[A-Za-z/+][\w./+-]*[/=][\w./=+',-]*", re.ASCII)
_DIGITS = re.compile(r"0|[1-9]\d*", re.ASCII)  # a text, which YAML writes in quotes


class YamlTexts:
    """Texts of nodes, equal to their part of `OmegaConf.to_yaml` of the whole.

    `to_yaml` takes 0.2 ms for a single scalar, mostly for a configuration that holds it.
    """

    def __init__(self) -> None:
        self._scalars: dict[str, str] = {}

    def node(self, key: str, value: Any, indent: int) -> str | None:
        """Return the lines of a key and its value; None if they cannot be put together here.

        Args:
            key: of the node.
            value: dictionaries, lists of scalars, and scalars; interpolations as they are written.
            indent: spaces before the key.
        """
        name = self._scalar(key, indent)
        if name is None or len(name) > _LONGEST_KEY:
            return None
        before = f"{' ' * indent}{name}:"
        parts: list[str | None]
        if isinstance(value, dict) and value:
            parts = [self.node(other, part, indent + 2) for other, part in value.items()]
        elif isinstance(value, list) and value:
            parts = [self.item(part, indent) for part in value]
        elif value == {} or value == []:
            return f"{before} {value}\n"
        else:
            text = self._scalar(value, len(before) + 1)
            return None if text is None else f"{before} {text}\n"
        return None if None in parts else "\n".join([before, "".join(map(str, parts))])

    def item(self, value: Any, indent: int) -> str | None:
        """Return the line of a scalar of a list; None if it cannot be put together here."""
        text = self._scalar(value, indent + 2)
        return None if text is None else f"{' ' * indent}- {text}\n"

    def _scalar(self, value: Any, column: int) -> str | None:
        """Return the text of a scalar that begins at a column."""
        if type(value) is str:
            width = column + len(value) + value.count("'") + 2
            may_break = " " in value and width > _WIDTH
            if may_break or not (value.isascii() and value.isprintable()):
                return None
            if _AS_IT_IS.fullmatch(value):
                return value
            if _DIGITS.fullmatch(value):
                return f"'{value}'"
        elif type(value) is int:
            return str(value)
        elif value is not None and type(value) not in (bool, float):
            return None
        kept = repr(value)
        if kept not in self._scalars:
            if len(self._scalars) == _MOST_TEXTS:
                self._scalars.clear()
            self._scalars[kept] = OmegaConf.to_yaml([value])[2:-1]
        return self._scalars[kept]
