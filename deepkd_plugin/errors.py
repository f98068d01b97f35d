"""The one exception that means "the user can mend this": printed as a single line, exit code 2."""


class UserError(Exception):
    """A mistake in what the program was given: a config, a file, a data set, a diverging recipe.

    The message is one line that says what was wrong, where it came from (file and key) and what
    would be right. The commands print it without a traceback and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        # a loader's worker process hands it on with its whole traceback in front
        super().__init__(message.rpartition("UserError: ")[2].strip())
