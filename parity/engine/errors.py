"""The error for a request that can't be carried out."""


class EngineError(Exception):
    """The message names what was asked for, why it can't be done, and what to do: commands print it alone."""
