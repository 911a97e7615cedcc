"""Search: a recipe's [tune] table says where, Optuna chooses what to try next, a database keeps what was found."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from training.best import Tuned, refuse_overwriting, write_best
from training.errors import MissingExtra, RecipeError, TrainingError
from training.metrics import better
from training.pipeline import Options, forget, train
from training.progress import say
from training.recipe import Recipe, keys_of, load
from training.search import Dimension, Tune

FREE_EPOCHS, FREE_TRIALS = 2, 5  # no trial is stopped before so many epochs, or before so many trials have ended
STUDY = "factorlens"  # the one study of a database
REFUSED = "refused"  # attribute of a trial that failed by itself, and was not cut off


@dataclass(frozen=True, kw_only=True)
class Study:
    """Where trials run, where the database lies and where the best recipe goes."""

    options: Options
    database: Path
    output: Path


def tune(path: Path, study: Study) -> Tuned:
    """Try until the database has `tune.trials` ended trials, then write the best recipe.

    The first trial is of the recipe's own values, as far as they are among those to try. A study that was stopped goes
    on, with the trial that was cut off first. TrainingError where the database is of
    another recipe or search, where every trial failed, and where `output` is a file that tune did not write.
    """
    optuna = _optuna()
    recipe = load(path)
    settings = _settings(path, recipe)
    refuse_overwriting(study.output)
    search = _open(optuna, recipe, settings, study.database)
    while (ended := len(_ended(optuna, search))) < settings.trials:
        trial = search.ask()
        chosen = {key: _suggest(trial, key, dimension) for key, dimension in settings.space.items()}
        say(f"trial {ended + 1} of {settings.trials}: {_spelt(chosen)}")
        _try(optuna, search, trial, load(path, _overrides(chosen)), study.options)
    tuned = _best(optuna, search, recipe, settings)
    write_best(path, study.output, tuned)
    return tuned


def _best(optuna: Any, search: Any, recipe: Recipe, settings: Tune) -> Tuned:
    ended = _ended(optuna, search)
    if not search.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        raise TrainingError(f"none of {len(ended)} trials ended with a {recipe.monitor}, so there is no best one")
    best = search.best_trial
    return Tuned(
        monitor=recipe.monitor,
        value=best.value,
        chosen={key: _decoded(best.params[key], dimension) for key, dimension in settings.space.items()},
        number=[trial.number for trial in ended].index(best.number) + 1,
        trials=len(ended),
    )


def _optuna() -> Any:
    try:
        import optuna
        import tomlkit  # noqa: F401
    except ImportError:
        raise MissingExtra("tune", "optuna", extra="tune") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _settings(path: Path, recipe: Recipe) -> Tune:
    """The recipe's search, every end and choice of which gives a recipe."""
    if recipe.tune is None:
        raise RecipeError(f"recipe {str(path)!r}: tune needs a [tune] table that says what to try (docs/training.md)")
    for key, dimension in recipe.tune.space.items():
        for end in dimension.ends:
            load(path, _overrides({key: end}))
    return recipe.tune


def _open(optuna: Any, recipe: Recipe, settings: Tune, database: Path) -> Any:
    """The study in this database, a new one where there is none."""
    database.parent.mkdir(parents=True, exist_ok=True)
    search = _study(optuna, recipe, database)
    said = _said(recipe)
    before = search.user_attrs.get("recipe", said)
    if changed := sorted(key for key in before.keys() | said.keys() if before.get(key) != said.get(key)):
        raise TrainingError(
            f"{str(database)!r} is of another search ({', '.join(changed)} changed since): choose another --study"
        )
    search.set_user_attr("recipe", said)
    for cut_off in search.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        search.tell(cut_off.number, state=optuna.trial.TrialState.FAIL)
        search.enqueue_trial(cut_off.params)
    if not search.trials and (own := _own(recipe, settings)):
        search.enqueue_trial(own)
    # A sampler that starts again must not draw again what it drew first.
    search.sampler = optuna.samplers.TPESampler(seed=recipe.fit.seed + len(search.trials))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=FREE_TRIALS, n_warmup_steps=FREE_EPOCHS)
    search.pruner = pruner if settings.prune else optuna.pruners.NopPruner()
    return search


def _own(recipe: Recipe, settings: Tune) -> dict[str, object]:
    """The recipe's own values of the keys to try, as Optuna keeps them, without those that are not to be tried."""
    model = {**recipe.model, **asdict(recipe.config)}
    said = json.loads(json.dumps({**recipe.model_dump(mode="json"), "model": model}))
    own: dict[str, object] = {}
    for key, dimension in settings.space.items():
        value: Any = said
        for name in keys_of(key):
            value = value.get(name) if isinstance(value, dict) else None
        if dimension.holds(value):
            own[key] = json.dumps(dimension.choices[dimension.choices.index(value)]) if dimension.choices else value
    return own


def _study(optuna: Any, recipe: Recipe, database: Path) -> Any:
    from sqlalchemy.exc import DatabaseError

    try:
        return optuna.create_study(
            study_name=STUDY,
            storage=f"sqlite:///{database}",
            direction="maximize" if better(recipe.monitor, 1.0, 0.0) else "minimize",
            load_if_exists=True,
        )
    except (DatabaseError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise TrainingError(
            f"{str(database)!r} is no study that can be opened ({reason}): choose another --study"
        ) from None


def _said(recipe: Recipe) -> dict[str, Any]:
    """What must stay the same in one study, by the tables of the recipe; there may be more trials."""
    return recipe.model_dump(mode="json", exclude_defaults=True, exclude={"tune": {"trials", "prune"}})


def _ended(optuna: Any, search: Any) -> list[Any]:
    """Trials that are over, in their order; one that was cut off is not, and is tried again."""
    states = optuna.trial.TrialState
    over = search.get_trials(states=[states.COMPLETE, states.PRUNED, states.FAIL])
    return [trial for trial in over if trial.state != states.FAIL or REFUSED in trial.user_attrs]


def _suggest(trial: Any, key: str, dimension: Dimension) -> object:
    if dimension.choices:
        return _decoded(trial.suggest_categorical(key, [json.dumps(choice) for choice in dimension.choices]), dimension)
    if dimension.integral:
        return trial.suggest_int(key, dimension.low, dimension.high, step=dimension.step or 1, log=dimension.log)
    return trial.suggest_float(key, dimension.low, dimension.high, step=dimension.step, log=dimension.log)


def _decoded(value: Any, dimension: Dimension) -> object:
    """Optuna keeps choices as JSON: it takes no lists."""
    return json.loads(value) if dimension.choices else value


def _overrides(chosen: Mapping[str, object]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in chosen.items()]


def _try(optuna: Any, search: Any, trial: Any, recipe: Recipe, options: Options) -> None:
    """One training run, from where it was cut off if it was; there is no bundle of it."""
    states = optuna.trial.TrialState

    def observe(entry: dict[str, float]) -> None:
        trial.report(entry[recipe.monitor], int(entry["epoch"]))
        if trial.should_prune():
            raise optuna.TrialPruned

    folder = f".tune-{_key(recipe)}"  # no recipe can have this name
    resume = (options.checkpoints / folder).exists()
    options = replace(options, folder=folder, resume=resume, observers=(observe,))
    try:
        fitted = train(recipe, options).fitted
        search.tell(trial, fitted.curve[fitted.best_epoch - 1][recipe.monitor])
    except optuna.TrialPruned:
        search.tell(trial, state=states.PRUNED)
        say(f"stopped: behind the median {recipe.monitor} of the trials before it")
    except TrainingError as error:
        trial.set_user_attr(REFUSED, str(error))
        search.tell(trial, state=states.FAIL)
        say(f"error: {error}")
    forget(recipe, options)


def _key(recipe: Recipe) -> str:
    return hashlib.sha256(recipe.model_dump_json(exclude={"tune", "export"}).encode()).hexdigest()[:12]


def _spelt(chosen: Mapping[str, object]) -> str:
    return ", ".join(
        f"{key} = {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in chosen.items()
    )
