"""What training refuses, as sentences for the person at the command line."""


class TrainingError(Exception):
    """Base of every error `training` raises on purpose."""


class RecipeError(TrainingError):
    """A recipe that names an unknown key, or a value that is not accepted."""


class DataError(TrainingError):
    """A file, row or column that cannot be used; the text names it and quotes the value."""


class MissingExtra(TrainingError):
    """Something that needs a package of an optional extra, which is not installed."""

    def __init__(self, what: str, package: str, *, extra: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed: pip install -e '.[{extra}]' in its folder")


class ExportRefused(TrainingError):
    """A model whose exported graphs do not answer as the trained model does."""
