"""The typed configuration: defaults, then a recipe, then dotted flags; unknown names are refused."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
import yaml

from data.config import DataConfig
from evaluation.config import EvaluationConfig
from evaluation.held_out import LOSS
from evaluation.metrics import per_user_metrics
from models.backbone import BackboneConfig
from trainers.config import TrainConfig

from .methods import METHODS
from .parser import SettingsParser, closest

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_MODEL = "bigrec"
Own = TypeVar("Own")


@dataclass
class RunConfig:
    """Every setting of a run. `method` holds the settings of the model that `model` names."""

    model: str
    data: DataConfig
    method: Any
    backbone: BackboneConfig | None
    train: TrainConfig
    evaluation: EvaluationConfig
    output: Path
    resume: str


@dataclass
class NoSettings:
    """What a command has beside the settings of a run, when it has nothing."""


def build_parser(model: str) -> SettingsParser:
    """Return the parser of one method's runs."""
    parser = SettingsParser(
        prog=f"launch/{Path(sys.argv[0]).name}",
        description=f"The settings of a {model} run. Those of another method: --model NAME --help.",
    )
    parser.add_argument("--model", type=str, default=DEFAULT_MODEL, help=f"one of {', '.join(METHODS)}")
    parser.add_argument(
        *("--recipe", "--config"),
        action="config",
        help="YAML settings: a recipe (launch/recipes/<source>/<model>.yaml is used when there is one and nothing is "
        "named) or an earlier run's config.yaml, which repeats that run",
    )
    parser.add_argument("--output", type=Path, default=None, help="run folder (runs/<source>-<model>)")
    parser.add_argument(
        "--resume", type=str, default="auto", help="auto: go on where this run folder stopped; never; or a checkpoint"
    )
    method = METHODS[model]
    parser.add_settings(DataConfig, "data")
    parser.add_settings(method.config, "method")
    if method.has_backbone:
        parser.add_settings(BackboneConfig, "backbone")
    parser.add_settings(TrainConfig, "train")
    parser.add_settings(EvaluationConfig, "evaluation")
    if not method.ranks:
        parser.set_defaults({"train.metric": LOSS})
    return parser


def parse(argv: list[str]) -> RunConfig:
    """Return the configuration of a command line; on a mistake, print what is wrong and how to mend it, and exit."""
    return parse_with(NoSettings, argv)[0]


def parse_with(own: type[Own], argv: list[str]) -> tuple[RunConfig, Own]:
    """Do what `parse` does for a command that has flags of its own: the fields of the dataclass `own`."""
    # The `deepspeed` launcher puts --local_rank=N first, and the same into $LOCAL_RANK, which is what is read.
    paths, flags = _without_files([word for word in argv if not word.startswith("--local_rank=")])
    files = {path: _read_yaml(path) for path in paths}
    named = [str(file["model"]) for file in files.values() if "model" in file] + _values(flags, "model")
    model = named[-1] if named else DEFAULT_MODEL
    if model not in METHODS:
        close = closest(model.lower(), METHODS)
        hint = f" (did you mean {close}?)" if close else ""
        sys.exit(f"error: --model {model}: expected one of {', '.join(METHODS)}{hint}")
    if not files and (recipe := _default_recipe(flags, model)):
        files = {str(recipe): _read_yaml(recipe)}
    parser = build_parser(model)
    parser.add_settings(own)
    for path, settings in files.items():
        _require_known(path, settings, parser)
    # Files first: flags win wherever they stand.
    values = parser.read([*(f"--recipe={path}" for path in files), *flags])
    _require_measured(model, values.train.metric, values.evaluation.cutoffs)
    _require_gate(model, values.get("backbone"))
    config = RunConfig(
        model=model,
        data=values.data,
        method=values.method,
        backbone=values.get("backbone"),
        train=values.train,
        evaluation=values.evaluation,
        output=values.output or Path("runs") / f"{Path(values.data.source).name}-{model}",
        resume=values.resume,
    )
    try:
        return config, own(**{name: values[name] for name in get_type_hints(own)})
    except ValueError as error:
        sys.exit(f"error: {error}")


def dump(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain YAML types; `parse(["--config", file])` reads it back."""
    return {
        name: plain(value)
        for name, value in vars(config).items()
        if value is not None and name not in ("output", "resume")
    }


def plain(value: Any) -> Any:
    """Return dataclasses, paths and tuples as the YAML types that the parser reads back."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _without_files(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the files that a command line names, and its other words."""
    paths, others = [], []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in ("--recipe", "--config"):
            others.append(word)
        elif path := value if equals else next(words, ""):
            paths.append(path)
        else:
            sys.exit(f"error: {flag} needs the path of a YAML file")
    return paths, others


def _values(argv: list[str], flag: str) -> list[str]:
    """Return the values that a flag is given on the command line, before any parser exists."""
    found = []
    for i, word in enumerate(argv):
        if word == f"--{flag}":
            found += argv[i + 1 : i + 2]
        elif word.startswith(f"--{flag}="):
            found.append(word.split("=", 1)[1])
    return found


def _default_recipe(flags: list[str], model: str) -> Path | None:
    source = [DataConfig.source, *_values(flags, "data.source")][-1]
    recipe = RECIPES / source / f"{model}.yaml"
    return recipe if recipe.is_file() else None


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        sys.exit(f"error: cannot read {path}: {error.strerror}. Recipes are in {RECIPES}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        sys.exit(f"error: {path} is not YAML: {' '.join(str(error).split())}")
    if not settings or not isinstance(settings, dict):
        sys.exit(f"error: {path} holds no settings: expected lines such as `data:` with `source: ml-100k` below it")
    return settings


def _require_known(path: str, settings: dict[str, Any], parser: SettingsParser, section: str = "") -> None:
    """Exit unless a file has settings of this method only, each section with its settings below it."""
    for key, value in settings.items():
        name = f"{section}{key}"
        parser.require_known(name, path)
        inside = [other for other in parser.types if other.startswith(f"{name}.")]
        if inside and isinstance(value, dict):  # elsewhere a dict is a value: the names in it are the user's own
            _require_known(path, value, parser, f"{name}.")
        elif inside:
            sys.exit(f"error: {path}: {name} is {value}; expected settings below it, such as {inside[0]}")


def _require_gate(model: str, backbone: BackboneConfig | None) -> None:
    """Exit where the backbone's experts would wait for a gate that the method does not make."""
    if backbone is not None and backbone.adapter == "moe-lora" and not METHODS[model].makes_gate:
        sys.exit(
            f"error: --backbone.adapter moe-lora mixes its experts by a gate from the user's state, and {model} makes "
            "none: pass --backbone.adapter lora"
        )


def _require_measured(model: str, metric: str, cutoffs: tuple[int, ...]) -> None:
    """Exit unless evaluations give the metric that selects the best checkpoint: the first of them comes late."""
    if not METHODS[model].ranks:
        if metric != LOSS:
            sys.exit(f"error: --train.metric {metric}: {model} ranks nothing, and is selected by its {LOSS}")
        return
    if not cutoffs or min(cutoffs) < 1:
        sys.exit(f"error: --evaluation.cutoffs {[*cutoffs]}: expected at least one, each at least 1")
    measured = per_user_metrics(np.zeros(1, int), np.zeros(1, int), cutoffs)
    if metric not in measured:
        names = dict.fromkeys(name.partition("@")[0] for name in measured)
        sys.exit(
            f"error: --train.metric {metric}: expected {', '.join(names)} at one of --evaluation.cutoffs "
            f"{[*cutoffs]}, such as NDCG@{max(cutoffs)}"
        )
