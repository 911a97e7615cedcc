"""Where the metrics of every epoch go beside the terminal: TensorBoard, MLflow. Both are extras, off by default."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from training.errors import MissingExtra, TrainingError
from training.fit import Observer
from training.recipe import START, Recipe


def add_log(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log",
        action="append",
        default=[],
        metavar="WHERE",
        help="write every epoch's metrics to tensorboard=DIR or mlflow=URI (such as sqlite:///mlflow.db), too",
    )


@contextmanager
def open_loggers(targets: Sequence[str], recipe: Recipe) -> Iterator[tuple[Observer, ...]]:
    """One observer for each `tensorboard=DIR` or `mlflow=URI`; they are closed when the block ends.

    TrainingError where a target is neither, its package is not installed, or it cannot be reached.
    """
    with ExitStack() as stack:
        yield tuple(stack.enter_context(_open(target, recipe)) for target in targets)


@contextmanager
def _open(target: str, recipe: Recipe) -> Iterator[Observer]:
    kind, _, place = target.partition("=")
    if kind not in LOGGERS or not place:
        raise TrainingError(f"--log {target!r:.80}: expected tensorboard=DIR or mlflow=URI")
    with LOGGERS[kind](place, recipe) as observer:
        yield observer


@contextmanager
def _tensorboard(folder: str, recipe: Recipe) -> Iterator[Observer]:
    """Scalars in `folder/<name>`, a step an epoch; a run that is resumed or restarted replaces what it does again."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtra("--log tensorboard", "tensorboard", extra="tensorboard") from None
    writers: list[Any] = []

    def observe(entry: dict[str, float]) -> None:
        epoch = int(entry["epoch"])
        if not writers:
            writers.append(SummaryWriter(os.path.join(folder, recipe.name), purge_step=epoch))
        for name, value in _metrics(entry).items():
            writers[0].add_scalar(name, value, epoch)
        writers[0].flush()

    try:
        yield observe
    finally:
        for writer in writers:
            writer.close()


@contextmanager
def _mlflow(uri: str, recipe: Recipe) -> Iterator[Observer]:
    """A run of the experiment `<name>`, with the recipe's settings as parameters."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it is read at import
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise MissingExtra("--log mlflow", "mlflow", extra="mlflow") from None
    status = "FAILED"
    try:
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(recipe.name)
        run = client.create_run(found.experiment_id if found else client.create_experiment(recipe.name)).info.run_id
        for name, value in _settings(recipe).items():
            client.log_param(run, name, value)

        def observe(entry: dict[str, float]) -> None:
            for name, value in _metrics(entry).items():
                client.log_metric(run, name.replace("@", "_at_"), value, step=int(entry["epoch"]))

        try:
            yield observe
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            client.set_terminated(run, status)
    except MlflowException as error:
        raise TrainingError(f"--log {f'mlflow={uri}'!r:.80}: {str(error).splitlines()[0]}") from None


LOGGERS = {"tensorboard": _tensorboard, "mlflow": _mlflow}


def _metrics(entry: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name != "epoch"}


def _settings(recipe: Recipe) -> dict[str, object]:
    """Task, model and fit under their dotted names; neither paths nor columns."""
    fit = recipe.fit.model_dump(mode="json", exclude_defaults=True)
    return {
        "task": recipe.task,
        **{f"model.{option}": value for option, value in recipe.model.items() if option not in START},
        **{f"fit.{option}": value for option, value in fit.items()},
    }
