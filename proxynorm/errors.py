"""Errors that end a command. The message is one line: what is wrong, where, and what to do."""


class ProxynormError(Exception):
    """Base class. The exit status is 2 for the user's mistakes; a fault sets it to 1."""

    status = 2


class ConfigError(ProxynormError):
    """A configuration name or value is wrong."""


class DataError(ProxynormError):
    """A data set is missing, incomplete or damaged."""


class FileError(ProxynormError):
    """A file cannot be written, because the disk is full or permissions are missing."""


class CheckpointError(ProxynormError):
    """A checkpoint is missing, is unreadable or belongs to another run."""
