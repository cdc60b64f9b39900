"""The one exception for faults that a user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A fault in the user's config, data, checkpoint or environment.

    The message says what is wrong, where (file, key, line), and what to do. The command line prints it without a
    traceback and exits with code 2.
    """


@contextmanager
def under_key(key: str) -> Iterator[None]:
    """What is at fault in here was named by this key of the config, and is told with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
