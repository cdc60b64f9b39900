"""The one exception for faults that a user can mend."""


class UserError(Exception):
    """A fault in the user's config, data, checkpoint or environment.

    The message says what is wrong, where (file, key, line), and what to do. The command line prints it without a
    traceback and exits with code 2.
    """
