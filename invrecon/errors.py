"""The one exception that speaks to the user."""


class InputError(ValueError):
    """A problem that the user can mend: what was wrong, where, what was expected and what to do.

    The command line prints its message as one sentence and exits with status 1; it never shows a traceback.
    """
