"""vLLM options as the user gave them, in Python or on the command line, read for planning."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dplaunch.argv import python_name, scan
from dplaunch.errors import UsageError
from dplaunch.spec import LaunchSpec

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Asked:
    """One view of `engine_args` and `vllm_argv`; None counts as not asked, as it does in vLLM."""

    def __init__(self, spec: LaunchSpec) -> None:
        python = {python_name(name): value for name, value in spec.engine_args.items()}
        values: Mapping[str, Any] = scan(spec.vllm_argv) | python
        self._values = {name: value for name, value in values.items() if value is not None}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> object:
        """The value as given; None when not asked."""
        return self._values.get(name)

    def text(self, name: str) -> str | None:
        """The value as a string; None when not asked.

        Raises:
            UsageError: when the flag came without its value.
        """
        value = self._values.get(name)
        if isinstance(value, bool):
            raise UsageError(f"{_flag(name)} needs a value")
        return None if value is None else str(value)

    def truth(self, name: str) -> bool:
        """Whether a switch is on; off when not asked."""
        value = self._values.get(name, False)
        return value.lower() not in ("false", "0", "no") if isinstance(value, str) else bool(value)

    def whole(self, name: str, default: int) -> int:
        """The value as a whole number of at least 1.

        Raises:
            UsageError: when it is none.
        """
        text = self.text(name)
        if text is None:
            return default
        if not text.isdecimal() or int(text) < 1:
            raise UsageError(f"{_flag(name)} must be a whole number of at least 1, not {text!r}")
        return int(text)

    def fraction(self, name: str) -> float | None:
        """The value as a number above 0 and up to 1; None when not asked.

        Raises:
            UsageError: when it is none.
        """
        text = self.text(name)
        if text is None:
            return None
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value <= 1:
            raise UsageError(f"{_flag(name)} must be above 0 and at most 1, not {text!r}")
        return value

    def size(self, name: str) -> int | None:
        """The value as bytes; `k` is a thousand and `K` 1024, as in vLLM. None when not asked.

        Raises:
            UsageError: when it is no size.
        """
        text = self.text(name)
        if text is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)", text.strip())
        if match is None:
            raise UsageError(f"{_flag(name)} must be a size such as 2G, not {text!r}")
        return int(float(match[1]) * _UNITS.get(match[2], 1))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
