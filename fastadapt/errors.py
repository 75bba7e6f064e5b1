"""The two ways a command ends badly."""


class UserError(ValueError):
    """A mistake of the user's, told in one line: the command line exits with status 2."""


class RunError(RuntimeError):
    """A run that could not go on, told in one line: the command line exits with status 1."""
