"""The named errors of hf_prefix: each message says what was got and what to do about it."""


class PrefixError(ValueError):
    """Base of every error that hf_prefix raises on purpose."""


class UnsupportedModelError(PrefixError):
    """The model has no attention that a prefix could be attached to, or one that we do not understand."""


class UnsupportedCallError(PrefixError):
    """The model was called in a way in which the prefix could not be honoured; it is never dropped silently."""


class PrefixMismatchError(PrefixError):
    """A saved prefix does not fit the model: other attention modules, other shapes, or unusable numbers."""


class PrefixFileError(PrefixError):
    """The files of a saved prefix are malformed, damaged, unsafe, or of a later format."""


class ConversionError(PrefixError):
    """A prefix cannot be converted, because the other format cannot hold it, or holds what a prefix here cannot be."""


class PrefixNotLoadedError(PrefixError):
    """A prefix was attached from a saved configuration, but its weights were never loaded."""


class DataError(PrefixError):
    """A data file is missing, empty, malformed, or does not fit the model's context."""


class TrainingError(PrefixError):
    """Training cannot go on, for example because the loss is no longer finite."""


class DivergenceError(TrainingError):
    """The loss or a gradient is no longer finite; the message names step, loss and likely cause."""


class MetricUnavailableError(PrefixError):
    """A metric needs a program or package that is not here; no other metric is put in its place."""
