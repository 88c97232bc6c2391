"""Reading TOML with types checked, so that a mistake in a file is one line that names file and key."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, NoReturn

from gpt2_tvm.errors import UserError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


class Table:
    """A table of a TOML file. Each `take_...` removes its key; `finish` complains about what is left.

    Args:
        values: the table.
        path: the file, for messages.
        name: the table's name, "" at the top of the file.
    """

    def __init__(self, values: dict[str, Any], path: Path, name: str = "") -> None:
        self._values = dict(values)
        self._path = path
        self._name = name
        self._known: list[str] = []

    def fail(self, what: str) -> NoReturn:
        """Raise the UserError that says `what` is wrong and where."""
        where = f" [{self._name}]" if self._name else ""
        raise UserError(f"{self._path}:{where} {what}")

    def take(self, key: str, types: type | tuple[type, ...], wanted: str, default: Any = ...) -> Any:
        """The value of `key`, of one of `types` (`wanted` in words); `default`, if there is one, where
        absent.
        """
        self._known.append(key)
        if key not in self._values:
            if default is ...:
                self.fail(f"{key} is missing: it must be {wanted}")
            return default
        value = self._values.pop(key)
        # bool is an int in Python, and never what a number is meant to be
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            self.fail(f"{key} must be {wanted}, not {value!r}")
        return value

    def text(self, key: str, default: Any = ...) -> Any:
        """A string."""
        return self.take(key, str, "a string", default)

    def one_of(self, key: str, choices: tuple[str, ...]) -> str:
        """One of `choices`."""
        value = self.take(key, str, f"one of {', '.join(choices)}")
        if value not in choices:
            self.fail(f"{key} must be one of {', '.join(choices)}, not {value!r}")
        return str(value)

    def texts(self, key: str, default: Any = ...) -> tuple[str, ...]:
        """A list of strings."""
        values = self.take(key, list, "a list of strings", default)
        if not all(isinstance(value, str) for value in values):
            self.fail(f"{key} must be a list of strings, not {values!r}")
        return tuple(values)

    def flag(self, key: str) -> bool:
        """true or false; false where absent."""
        return bool(self.take(key, bool, "true or false", False))

    def count(self, key: str, default: Any = ...) -> Any:
        """A whole number of at least 1."""
        value = self.take(key, int, "a whole number", default)
        if value is not None and value < 1:
            self.fail(f"{key} must be at least 1, not {value}")
        return value

    def rate(self, key: str) -> float | None:
        """A number above 0; None where absent."""
        value = self.take(key, (int, float), "a number", None)
        if value is not None and not value > 0:
            self.fail(f"{key} must be above 0, not {value}")
        return None if value is None else float(value)

    def table(self, key: str, required: bool = False) -> Table | None:
        """The table `key`; None where it is absent and not required."""
        values = self.take(key, dict, f"a table, [{key}]", ... if required else None)
        return None if values is None else Table(values, self._path, key)

    def rest(self) -> dict[str, Any]:
        """All that was not taken, for tables whose keys are another program's (TVM's)."""
        values, self._values = self._values, {}
        return values

    def finish(self) -> None:
        """Fail if a key is left that nothing took."""
        for key in self._values:
            close = difflib.get_close_matches(key, self._known, n=1)
            self.fail(
                f"{key} is not a key here; "
                + (f"did you mean {close[0]}?" if close else f"there are {', '.join(self._known)}")
            )


def read(path: Path) -> Table:
    """The TOML file at `path`.

    Raises:
        UserError: it cannot be read, or is not TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the target {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8, so not a target") from error
    try:
        return Table(tomllib.loads(text), path)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
