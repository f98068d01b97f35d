"""The one exception that means "the user can mend this": printed as a single line, exit code 2."""


class UserError(Exception):
    """A mistake in what the program was given: a config, a file, a data set, a diverging recipe.

    The message is one line that says what was wrong, where it came from (file and key) and what
    would be right. `launch.main` prints it without a traceback and exits with code 2.
    """
