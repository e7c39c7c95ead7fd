"""The one exception that the command line turns into a single line and exit code 2."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what it was, what is accepted."""
