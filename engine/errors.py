"""Errors that a user can mend, and the one place where scripts turn them into a line and an exit code."""

import os
import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """Bad input: the message says what is wrong, what is allowed and what to do, in one line."""


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # all ranks stop for the same reason; one says it
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
