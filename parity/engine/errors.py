"""The error of somebody who asks for what can't be done."""


class EngineError(Exception):
    """The message names what was asked for, why it can't be done, and what to do: commands print it alone."""
