"""Define the exceptions whose message is one line for the user, shown without a traceback."""


class UserError(Exception):
    """Report bad input: a file, a key or a value. The message names it and says what would be right."""


class TrialFailed(Exception):
    """Report that a trial ended without a usable result; the message is the reason that the sweep records."""
