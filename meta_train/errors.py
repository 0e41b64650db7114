"""The mistakes of users that meta-training, the benchmark and the command line report, each in one line."""


class UserError(ValueError):
    """A user's mistake, or a file of theirs that is missing or damaged; its text is one line for them."""


class UsageError(UserError):
    """A mistake on the command line."""
