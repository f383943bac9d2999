"""The exceptions and warnings of the toolkit, each with a remedy in its text.

Every message answers three questions: what was seen, where, and what to do instead.
This file imports nothing, so that any room may use it.
"""

__all__ = [
    "CheckpointError",
    "DataBakedWarning",
    "DataError",
    "InferenceWarning",
    "InitializationError",
    "MethodError",
    "ModelError",
    "OptionError",
    "PPLError",
    "SamplingError",
    "SiteError",
]


class PPLError(Exception):
    """Base class of every error the toolkit raises on purpose."""


class DataError(PPLError, ValueError):
    """The data cannot be used: NaN where a value is needed, empty, wrong shape or type."""


class ModelError(PPLError, ValueError):
    """The model cannot be run or is not a probabilistic program."""


class SiteError(PPLError, KeyError):
    """A site name is unknown, or a value for a site has the wrong shape or support."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class MethodError(PPLError, ValueError):
    """The method is unknown, or cannot serve this model."""


class OptionError(PPLError, ValueError):
    """An option of `infer` or of a method has a value outside its range."""


class InitializationError(PPLError, ValueError):
    """No starting point with a finite log density and gradient could be found."""


class CheckpointError(PPLError, ValueError):
    """A stored run cannot be resumed: it is missing, damaged, or belongs to another model."""


class SamplingError(PPLError, RuntimeError):
    """A run failed part of the way through.

    Attributes:
        partial: the result with the draws of all completed chunks, or None if there were none.
    """

    partial: object = None


class InferenceWarning(UserWarning):
    """A run finished, but its draws need a second look. Raised at most once per run.

    Attributes:
        result: the result, which would be lost where warnings are errors.
    """

    result: object = None


class DataBakedWarning(UserWarning):
    """Some data could not be passed to the compiled program as an argument."""
