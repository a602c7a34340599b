"""User errors. Each message is one line: what is wrong, where, and what to do."""


class ProxynormError(Exception):
    """Base of the errors that end a command with one line and exit status 2, or 1 for a fault."""

    status = 2


class ConfigError(ProxynormError):
    """A configuration name or value is wrong."""


class DataError(ProxynormError):
    """A data set is missing, incomplete or damaged."""


class FileError(ProxynormError):
    """A file cannot be written: the disk is full, or permissions are missing."""


class CheckpointError(ProxynormError):
    """A checkpoint is missing, unreadable or belongs to another run."""
