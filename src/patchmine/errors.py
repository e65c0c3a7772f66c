"""The one exception that means: the user can mend this.  The command line prints its sentence and exits with 2."""


class UserError(Exception):
    """A mistake in settings, files or folders.  The message names the setting or file and the remedy."""
