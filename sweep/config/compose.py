"""From overrides to a grid of configs: Hydra's groups, grammar and Compose API. The home of `hydra`.

Hydra's own multirun composes every job of the product (384 jobs: 13 s) and writes before it validates. Here each
distinct choice is composed once, and the product is ours.
"""

import functools
import itertools
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sweep.config.schema import OWN_KINDS, SECTIONS, DatasetConfig, SweepConfig, TargetConfig, from_nodes, to_plain
from sweep.config.targets import Target
from sweep.core import cache
from sweep.core.errors import SweepError, require_known
from sweep.core.paths import bundled_model_dir, conf_dir
from sweep.core.sizes import n_samples_of, size_name
from sweep.core.typed import Plain, Section

_Nodes: TypeAlias = dict[str, dict[str, Plain]]  # composed, by group

# Groups and keys of the run, not of a trial: they cannot be axes.
_OF_THE_RUN = frozenset({"store", "output_layout", "cluster", "grid", "target", "validation", "sensitivity.memory_gb"})
# Keys that take a list, which may be typed as one of a grid, too: a,b is [a,b].
_LISTS = frozenset({"validation.dataset", "validation.path"})
DEFAULT_GRID = "deployable"  # of a multirun that says neither what to span nor which recipe
# The keys of a point of a target's grid.
_RECIPE_KEYS: tuple[str, ...] = ("quant_pair", "quant_granularity", "sensitivity.quant_algorithm")


def _refuse_environment(name: str, *default: str) -> str:
    raise SweepError(
        f"${{oc.env:{name}}} would write a value of the environment into the store and the reports, "
        "where the composed config is kept. "
        f'If it is no secret, let the shell put it in: key="${name}".'
    )


OmegaConf.register_new_resolver("oc.env", _refuse_environment, replace=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class GridConfig(Section):
    """A file of the group ``grid``."""

    axes: Mapping[str, list[str | int | float | bool]]  # values by key
    points: Literal["all", "target"]  # the product of the axes; its recipes are those that the target runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Points to measure; one without axes."""

    points: tuple[SweepConfig, ...]  # the first axis varies slowest
    axes: Mapping[str, tuple[str, ...]]  # values as typed, by key


def expand(overrides: Sequence[str], *, multirun: bool, default_grid: str = "none") -> Grid:
    """Compose the grid that the overrides span.

    Args:
        overrides: Hydra's: ``group=option``, ``key=value``, with `multirun` also ``a,b``, ``glob(*)``, ``range(...)``.
        multirun: whether more than one point is wanted.
        default_grid: the grid file taken with `multirun` where the overrides name neither one, nor a list, nor a
            recipe.

    Raises: SweepError: an unknown group, option or key (with the nearest spelling), or a value that is not allowed.
    """
    with _composing():
        return _expand(overrides, multirun, default_grid)


def dataset_of(option: str, path: str | None) -> DatasetConfig:
    """An option of the group ``dataset``, which reads a file, directory or hub id if it is of a kind that needs one.

    Raises: SweepError: no such option, one that needs a path and has none, or one that has samples of its own.
    """
    with _composing():
        require_known("data set in validation.dataset", option, _group_options()["dataset"])
        nodes = {section: dict(node) for section, node in _composed({"dataset": option}).items()}
    node = nodes["dataset"]
    kind = node["kind"]
    if kind in OWN_KINDS and path is None:
        raise SweepError(f"validation.dataset={option} reads files of yours. Type validation.path=PATH in its place.")
    if kind not in (*OWN_KINDS, "captions") and path is not None:
        raise SweepError(
            f"validation.path={path} is nothing that data set {option!r} reads: it brings its own samples. "
            "Type null in its place."
        )
    node["captions_path" if kind == "captions" else "path"] = path
    _fill_in(nodes)
    return DatasetConfig.from_node("dataset", node)


@contextmanager
def _composing() -> Generator[None]:
    """Hydra at work on the config tree. Raises: SweepError: what it refuses."""
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            yield
    except (HydraException, OmegaConfBaseException) as error:
        if isinstance(error.__cause__, SweepError):
            raise error.__cause__ from None
        raise SweepError(
            f"{str(error).strip().splitlines()[0]} Overrides are Hydra's: group=option or key=value. "
            "See: sweep run --help"
        ) from error


def to_yaml(config: SweepConfig) -> str:
    """The composed config for people to read."""
    return yaml.safe_dump(to_plain(config), sort_keys=False)


def _expand(overrides: Sequence[str], multirun: bool, default_grid: str) -> Grid:
    options = _group_options()
    given: dict[str, tuple[str, ...]] = {}
    for override in map(_parsed, overrides):
        _check_form(override, multirun)
        given[override.get_key_element()] = tuple(dict.fromkeys(_values(override)))
    for key, values in given.items():
        if not values:
            raise SweepError(f"{key}=... matches nothing. Choose among: {', '.join(options.get(key, ()))}.")
        if len(values) > 1 and (key.split(".")[0] in _OF_THE_RUN or key in _OF_THE_RUN):
            raise SweepError(
                f"{key} is one for the whole grid, but {len(values)} values are given. "
                "Type one, or run the sweeps one after the other."
            )
    _check_groups(given, options)
    _check_keys(given, options)
    if multirun and not any(len(values) > 1 or key in ("grid", *_RECIPE_KEYS) for key, values in given.items()):
        given["grid"] = (default_grid,)
    singles = {key: values[0] for key, values in given.items() if len(values) == 1}
    base = _composed(singles)
    grid = GridConfig.from_node("grid", base["grid"])
    if grid.axes and not multirun:
        raise SweepError("grid=... spans a grid. Add -m: sweep run -m grid=NAME")
    # The grid file's axes, each replaced by what was typed for its key, and then the other lists typed.
    axes = {key: given.get(key, tuple(map(str, values))) for key, values in grid.axes.items()}
    axes |= {key: values for key, values in given.items() if len(values) > 1}
    recipes: list[dict[str, str]] = [{}]
    if grid.points == "target":
        recipes = _target_points(base, given)
        axes = {key: values for key, values in axes.items() if key not in _RECIPE_KEYS}
    spanned = {key: tuple(dict.fromkeys(map(itemgetter(key), recipes))) for key in recipes[0]} | axes
    _check_groups(spanned, options)
    choices = _choices(singles, spanned)
    points: list[SweepConfig] = []
    for recipe, values in itertools.product(recipes, itertools.product(*axes.values())):
        chosen = recipe | dict(zip(axes, values, strict=True))
        points.append(_point(base, choices, chosen, options))
    return Grid(points=tuple(points), axes=spanned)


def _target_points(base: _Nodes, given: Mapping[str, tuple[str, ...]]) -> list[dict[str, str]]:
    """The recipes that the target runs, of those typed if any were.

    Raises: SweepError: it runs none of them.
    """
    target = Target.from_config(TargetConfig.from_node("target", base["target"]))
    pairs, granularities = (given.get(key) for key in _RECIPE_KEYS[:2])
    algorithms = given.get(_RECIPE_KEYS[2], (str(base["sensitivity"]["quant_algorithm"]),))
    points = [
        dict(zip(_RECIPE_KEYS, point, strict=True))
        for point in target.points(pairs=pairs, granularities=granularities, algorithms=algorithms)
    ]
    if not points:
        asked = "; ".join(f"{key}={','.join(given[key])}" for key in _RECIPE_KEYS if key in given)
        runs = ", ".join(recipe.name for recipe in target.recipes)
        raise SweepError(
            f"Target {target.name}, {target.runtime}, runs none of the points asked for: {asked or algorithms[0]}. "
            f"It runs: {runs}. "
            "Type some of those, another target=NAME, or grid=none to score what nothing runs."
        )
    return points


def _parsed(override: str) -> Override:
    # A shell leaves ~ in key=~/path, and Hydra's grammar has no ~.
    with_home = re.sub(r"([=,\[])~(?=/)", lambda found: f"{found[1]}{Path.home()}", override)
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    try:
        return parser.parse_overrides([with_home])[0]
    except HydraException as error:
        raise SweepError(
            f"Cannot read the override {override!r}. Type group=option or key=value, as in Hydra; "
            "a value with special characters goes in quotes, for the shell too: 'key=\"value\"'. See: sweep run --help"
        ) from error


def _group_options() -> dict[str, list[str]]:
    """The options of each group: its YAML files' names."""
    options: dict[str, list[str]] = {path.name: [] for path in conf_dir().iterdir() if path.is_dir()}
    for path in sorted(conf_dir().glob("*/*.yaml")):
        options[path.parent.name].append(path.stem)
    return options


def _check_form(override: Override, multirun: bool) -> None:
    if override.type is not OverrideType.CHANGE:
        raise SweepError(
            f"{override.input_line!r} adds or removes a key; the keys are fixed. Type key=value. "
            "All of them: sweep run --cfg job"
        )
    if _is_list(override):
        return
    if override.is_sweep_override() and not multirun:
        raise SweepError(
            f"{override.input_line!r} names several values. Add -m for a grid: sweep run -m {override.input_line}"
        )
    if override.is_sweep_override() and not override.is_discrete_sweep():
        raise SweepError(
            f"{override.input_line!r} is no list of values. A grid needs a,b or choice(), range() or glob()."
        )


def _is_list(override: Override) -> bool:
    return override.get_key_element() in _LISTS and override.is_choice_sweep()


def _values(override: Override) -> Iterator[str]:
    if _is_list(override):
        yield f"[{','.join(override.sweep_string_iterator())}]"
    elif override.is_sweep_override():
        yield from override.sweep_string_iterator()
    else:
        yield override.get_value_element_as_str()


def _check_groups(given: Mapping[str, Sequence[str]], options: Mapping[str, Sequence[str]]) -> None:
    for key, values in given.items():
        if "." not in key:
            require_known("group", key, options)
            for value in values:
                require_known(key, value, options[key])


def _check_keys(given: Mapping[str, Sequence[str]], options: Mapping[str, Sequence[str]]) -> None:
    """Refuse an unknown key with its nearest spelling, which Hydra does not name."""
    chosen = {key: values[0] for key, values in given.items() if key in options}
    known = list(_leaves(_composed(chosen)))
    for key in given:
        if key not in options:
            require_known("key", key, known)


def _choices(singles: Mapping[str, str], axes: Mapping[str, Sequence[str]]) -> dict[str, dict[str, _Nodes]]:
    """A composed config for each value of each axis.

    Axes are composed side by side, so there are as many configs as the longest axis has values.
    """
    choices: dict[str, dict[str, _Nodes]] = {key: {} for key in axes}
    for index in range(max(map(len, axes.values()), default=0)):
        chosen = {key: values[min(index, len(values) - 1)] for key, values in axes.items()}
        composed = _composed({**singles, **chosen})
        for key, value in chosen.items():
            choices[key].setdefault(value, composed)
    return choices


def _composed(chosen: Mapping[str, str]) -> _Nodes:
    def compute() -> _Nodes:
        overrides = [f"{key}={value}" for key, value in chosen.items()]
        composed: Any = OmegaConf.to_container(compose("config", overrides=overrides), resolve=True)
        return composed

    return cache.remember("composed", [2, version("hydra-core"), _tree_key(), list(chosen.items())], compute)


@functools.cache
def _tree_key() -> list[list[str | int]]:
    """Path, size and modification time of each file of the config tree: equal as long as none has changed."""
    files = [(path, path.stat()) for path in sorted(conf_dir().rglob("*.yaml"))]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in files]


def _leaves(nodes: _Nodes) -> Iterator[str]:
    """Every key: of the groups, and of mappings inside them."""
    left: list[tuple[str, Plain]] = list(nodes.items())
    while left:
        key, value = left.pop()
        if isinstance(value, Mapping) and value:
            left += [(f"{key}.{name}", item) for name, item in value.items()]
        else:
            yield key


def _point(
    base: _Nodes,
    choices: Mapping[str, Mapping[str, _Nodes]],
    values: Mapping[str, str],
    options: Mapping[str, Sequence[str]],
) -> SweepConfig:
    """The base with each axis' node put in.

    Groups come first and single keys after, so that `dataset=a,b dataset.size=...` works.
    """
    nodes = {section: dict(base[section]) for section in SECTIONS}
    for key in sorted(values, key=lambda key: key not in options):
        section, _, name = key.partition(".")
        found = choices[key][values[key]][section]
        if "." in name:
            raise SweepError(
                f"{key} cannot be an axis: write a new option of group {section!r} instead, conf/{section}/NAME.yaml."
            )
        nodes[section] = nodes[section] | {name: found[name]} if name else dict(found)
    _fill_in(nodes)
    return from_nodes(nodes)


def _fill_in(nodes: _Nodes) -> None:
    """Fill in values that follow from others: names from paths, a size's name, the store's absolute path."""
    model, dataset, uri = nodes["model"], nodes["dataset"], nodes["store"].get("uri")
    if model.get("path") is None and model.get("name") is None:
        model["name"] = bundled_model_dir().name
    for named in (model, dataset):
        path = named.get("path")
        if named.get("name") is None and isinstance(path, str) and path != "???":
            named["name"] = _slug(path)
    if isinstance(size := dataset.get("size"), int | str):
        dataset["size"] = size_name(n_samples_of(str(size)))
    if isinstance(uri, str) and "://" not in uri:
        nodes["store"]["uri"] = str(Path(uri).expanduser().absolute())


def _slug(path: str) -> str | None:
    """A name for what lies at a path: ``chats_2`` for ``/data/Chats-2.jsonl``; None: nothing is left of it."""
    name = re.sub(r"\.(jsonl?|parquet|arrow|txt)$", "", Path(path).name.lower())
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_") or None
