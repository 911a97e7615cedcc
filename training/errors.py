"""What training refuses, as sentences for the person at the command line."""


class TrainingError(Exception):
    """Base of every error `training` raises on purpose."""


class RecipeError(TrainingError):
    """A recipe that names an unknown key, or a value that is not accepted."""


class DataError(TrainingError):
    """A file, row or column that cannot be used; the text names it and quotes the value."""


class ExportRefused(TrainingError):
    """A model whose exported graphs do not answer as the trained model does."""
