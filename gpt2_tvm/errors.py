"""The one kind of error that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and how to mend it.

    Command lines print it as ``error: <message>`` and exit with status 1; as a library it is an ordinary exception.
    """
