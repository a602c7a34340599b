"""Errors that are the user's to mend. Each message is one line: what is wrong, where, and what to do."""


class ProxynormError(Exception):
    """Base of the errors that end a command with exit status 2 and one line."""


class ConfigError(ProxynormError):
    """A configuration name or value is wrong."""


class DataError(ProxynormError):
    """A data set is missing, incomplete or damaged."""


class FileError(ProxynormError):
    """A file cannot be written: the disk is full, or the folder is not the user's."""


class CheckpointError(ProxynormError):
    """A checkpoint is missing, unreadable or belongs to another run."""
