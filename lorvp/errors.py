"""What a user did that cannot work, as one line to be shown without a traceback."""


class UserError(Exception):
    """Bad input: a file, a key or a value. The message names it and says what would be right."""


class TrialFailed(Exception):
    """A trial ended without a usable result; the message is the reason, as recorded for the sweep."""
