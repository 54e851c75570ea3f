"""A recipe: which layers of a model are quantized, on what grid and by which method. Written in YAML.

    name: w4a16-gptq-g64
    calibration: {windows: 32, tokens: 256}
    transforms:                  # in order, before the rules; may be left out
      - name: rotate
        options: {seed: 0}
    rules:
      - match: model.layers.*    # shell pattern over Hugging Face names; the first that matches wins
        weight: int4 g64 asym    # a QuantSpec, or keep
        method: gptq
        options: {act_order: true}
        input: int8 g32 narrow scale=fp32  # the grid of the activations; left out, they stay as they are
    kv: {key: fp16, value: int8 channel}  # what keys and values are kept in; left out, they stay in fp32
    train: {steps: 1000}         # quantization-aware training afterwards; may be left out

A recipe's name follows the field: w4a16-gptq-g64 has 4-bit weights, activations that are not quantized
(16-bit floats on most GPUs, float32 here), GPTQ, groups of 64; w4a8-rtn-g32 has activations of 8 bits.
``str(recipe)`` writes out everything that such a name leaves open.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from labkit.models.kv import KVSpec
from labkit.models.transforms import TRANSFORMS
from labkit.quant import METHODS, QuantSpec
from labkit.quant.methods import Method

KEEP = "keep"
_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Rule:
    """What happens to the layers whose name matches.

    match     shell pattern over the whole name: ``model.layers.*.mlp.*``, ``*.q_proj``, ``lm_head``
    weight    the grid, or None to leave these layers as they are
    method    a name in ``labkit.quant.METHODS``; None exactly when weight is None
    options   handed to the method: ``{"act_order": True}``
    input     the grid that what these layers multiply is rounded to, each token by itself, with scales found in
              each call; None leaves it as it is
    """

    match: str
    weight: QuantSpec | None
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    input: QuantSpec | None = None

    def __post_init__(self) -> None:
        if (self.weight is None) != (self.method is None):
            raise ValueError(
                f"rule {self.match!r}: a weight spec and a method come together, found weight "
                f"{self.weight or KEEP} and method {self.method}; give both or neither"
            )
        if self.weight is None and self.options:
            raise ValueError(
                f"rule {self.match!r} leaves its layers alone, yet has options {dict(self.options)}"
            )
        if self.weight is None and self.input is not None:
            raise ValueError(f"rule {self.match!r} leaves its layers alone, yet has the input {self.input}")
        if self.input is not None and (isinstance(self.input.block, int) or self.input.block[0] != 1):
            raise ValueError(
                f"rule {self.match!r}: tokens of different texts would share a scale in input {self.input}; "
                "expected channel (one for each token) or groups, such as int8 g32"
            )


@dataclass(frozen=True)
class Transform:
    """What is done to the whole model first: a name in ``labkit.models.transforms.TRANSFORMS``, its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """How much text the methods and transforms that need statistics see: ``windows`` times ``tokens``."""

    windows: int = 32
    tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("windows", "tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"calibration.{name} must be a positive whole number, found {value!r}")


@dataclass(frozen=True)
class Training:
    """How long and how fast the quantized layers are trained after their rule's method has found their grids.

    steps       of ``windows`` times ``tokens`` tokens each
    rate        AdamW's learning rate for the weights, in units of the root mean square of each layer's weights,
                so that it means the same for every model; after ``warmup`` steps it falls along a cosine to
                a tenth
    scale_rate  the same for the scales and offsets, in the same unit
    decay       AdamW's decoupled weight decay; the scales have none
    """

    steps: int = 1000
    windows: int = 8
    tokens: int = 256
    rate: float = 8e-3
    scale_rate: float = 4e-3
    warmup: int = 20
    decay: float = 0.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value, whole = getattr(self, f.name), isinstance(f.default, int)
            least = 0 if f.name in ("warmup", "decay", "scale_rate") else 1 if whole else 5e-324
            kind = int if whole else (int, float)
            if not isinstance(value, kind) or isinstance(value, bool) or not least <= value < math.inf:
                raise ValueError(
                    f"train.{f.name} must be a {'whole ' if whole else ''}number "
                    f"{'of at least 0' if least == 0 else 'above 0'}, found {value!r}"
                )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Transforms of the whole model in order, which keep its function; then, for each layer, the first rule
    that matches its name. What none matches is left alone. ``kv`` is what keys and values are kept in. With
    ``train`` the layers are trained on their grids afterwards.
    """

    rules: tuple[Rule, ...]
    transforms: tuple[Transform, ...] = ()
    name: str = "unnamed"
    calibration: Calibration = Calibration()
    kv: KVSpec = field(default_factory=KVSpec)
    train: Training | None = None

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """A recipe that ships with labkit, by name, or a YAML file, by path.

        Raises FileNotFoundError for an unknown name or path, ValueError for what ``parse`` refuses.
        """
        text = str(source)
        path = Path(source)
        if not path.suffix and "/" not in text:
            path = _FOLDER / f"{text}.yaml"
            if not path.exists():
                raise FileNotFoundError(
                    f"no recipe {text!r}; labkit has {', '.join(names())}; your own is given by its path"
                )
        try:
            content = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise FileNotFoundError(
                f"no recipe file {path}; labkit's own are {', '.join(names())}"
            ) from None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"recipe {path}: expected YAML text, found bytes that are not UTF-8 ({error})"
            ) from None
        return cls.parse(content, where=str(path), name=path.stem)

    @classmethod
    def parse(cls, text: str, *, where: str = "recipe", name: str = "unnamed") -> Recipe:
        """A recipe from its YAML text. ``where`` stands in errors; ``name`` is used if the text has none.

        Raises ValueError for text that is no YAML, an unknown or missing key, a spec that does not parse.
        """
        try:
            tree = yaml.load(text, Loader=_StrictLoader)
        except yaml.YAMLError as error:
            raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
        return cls.from_dict(tree, where=where, name=name)

    @classmethod
    def from_dict(cls, tree: Any, *, where: str = "recipe", name: str = "unnamed") -> Recipe:
        """A recipe from what ``to_dict`` or YAML gives. Raises ValueError as ``parse`` does."""
        _keys(
            tree, required={"rules"}, optional={"name", "calibration", "transforms", "kv", "train"}, where=where
        )
        if not isinstance(tree["rules"], list) or not tree["rules"]:
            raise ValueError(f"{where}: rules must be a list of at least one rule, found {tree['rules']!r}")
        if not isinstance(name := tree.get("name", name), str):
            raise ValueError(f"{where}: name must be a text, found {name!r}")
        rules = tuple(_rule(r, f"{where}, rule {i}") for i, r in enumerate(tree["rules"], start=1))
        if not isinstance(steps := tree.get("transforms", []), list):
            raise ValueError(f"{where}: transforms must be a list, found {steps!r}")
        transforms = tuple(_transform(t, f"{where}, transform {i}") for i, t in enumerate(steps, start=1))
        calibration, train = tree.get("calibration", {}), tree.get("train")
        _keys(calibration, optional={f.name for f in fields(Calibration)}, where=f"{where}, calibration")
        _keys(kv := tree.get("kv", {}), optional={f.name for f in fields(KVSpec)}, where=f"{where}, kv")
        if train is not None:
            _keys(train, optional={f.name for f in fields(Training)}, where=f"{where}, train")
        try:
            return cls(
                rules=rules,
                transforms=transforms,
                name=name,
                calibration=Calibration(**calibration),
                kv=KVSpec(**kv),
                train=None if train is None else Training(**train),
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``from_dict`` reads back into an equal recipe, with every option written out."""
        rules: list[dict[str, Any]] = []
        for rule in self.rules:
            if rule.weight is None:
                rules.append({"match": rule.match, "weight": KEEP})
                continue
            options = expand(rule)
            rules.append({"match": rule.match, "weight": str(rule.weight), "method": rule.method})
            if options:
                rules[-1]["options"] = options
            if rule.input is not None:
                rules[-1]["input"] = str(rule.input)
        calibration = {"windows": self.calibration.windows, "tokens": self.calibration.tokens}
        tree: dict[str, Any] = {"name": self.name, "calibration": calibration, "rules": rules}
        if self.transforms:
            tree["transforms"] = [
                {"name": t.name, "options": options}
                if (options := expand_transform(t))
                else {"name": t.name}
                for t in self.transforms
            ]
        if self.kv != KVSpec():
            tree["kv"] = asdict(self.kv)
        if self.train is not None:
            tree["train"] = asdict(self.train)
        return tree

    def rule_for(self, layer: str) -> Rule | None:
        """The first rule that matches the layer's name, or None."""
        return next((rule for rule in self.rules if fnmatchcase(layer, rule.match)), None)

    def input_for(self, layer: str) -> QuantSpec | None:
        """The grid of what this layer multiplies, or None where it stays as it is."""
        rule = self.rule_for(layer)
        return None if rule is None else rule.input

    def plan(self, layers: Collection[str], methods: Mapping[str, Method] = METHODS) -> dict[str, Rule]:
        """Which rule quantizes which layer, for the layers that are quantized, in the order given.

        Raises ValueError before any work is done for a method that ``methods`` lacks or a transform that
        there is not, an option that it does not take, a spec that the method cannot do, a quantizing rule
        that matches no layer, and a recipe
        that quantizes nothing.
        """
        for step in self.transforms:
            if step.name not in TRANSFORMS:
                raise ValueError(
                    f"recipe {self.name}: there is no transform {step.name!r}; there is "
                    f"{', '.join(sorted(TRANSFORMS))}"
                )
            self._check_options("transform", step.name, TRANSFORMS[step.name], step.options)
        for rule in self.rules:
            if rule.method is None:
                continue
            if rule.method not in methods:
                raise ValueError(
                    f"recipe {self.name}: rule {rule.match!r} asks for method {rule.method!r}; there is "
                    f"{', '.join(sorted(methods))}"
                )
            self._check_options("method", rule.method, methods[rule.method], rule.options)
            if check := getattr(methods[rule.method], "check", None):
                try:
                    check(rule.weight, **rule.options)
                except ValueError as error:
                    raise ValueError(f"recipe {self.name}: rule {rule.match!r}: {error}") from None
            if not any(fnmatchcase(layer, rule.match) for layer in layers):
                raise ValueError(
                    f"recipe {self.name}: rule {rule.match!r} matches no linear layer of the model, whose "
                    f"names are like {', '.join(list(layers)[:2])}; correct the pattern or remove the rule"
                )
        plan = {}
        for layer in layers:
            rule_ = self.rule_for(layer)
            if rule_ is not None and rule_.weight is not None:
                plan[layer] = rule_
        if not plan:
            raise ValueError(
                f"recipe {self.name} quantizes no layer; add a rule with a weight spec and a method"
            )
        return plan

    def _check_options(
        self, kind: str, name: str, function: Callable[..., Any], options: Mapping[str, Any]
    ) -> None:
        known = defaults(function)
        if known is not None and (unknown := set(options) - set(known)):
            raise ValueError(
                f"recipe {self.name}: {kind} {name!r} has no option "
                f"{', '.join(sorted(unknown))}; it takes {', '.join(sorted(known)) or 'none'}"
            )

    @property
    def calibrated(self) -> bool:
        """Whether any transform or any rule's method looks at the layers' inputs."""
        return any(needs(METHODS[r.method]) for r in self.rules if r.method in METHODS) or any(
            needs(TRANSFORMS[t.name]) for t in self.transforms if t.name in TRANSFORMS
        )

    def __str__(self) -> str:
        """The full expansion, itself a YAML recipe: what a name leaves open stands here."""
        lines = [f"name: {self.name}"]
        seen = "" if self.calibrated else "  # not used: no method here looks at text"
        lines.append(
            f"calibration: {{windows: {self.calibration.windows}, tokens: {self.calibration.tokens}}}{seen}"
        )
        if self.transforms:
            lines.append(
                "transforms:  # in this order, before the rules; each keeps the function of the model"
            )
        for step in self.transforms:
            lines.append(f"- name: {step.name}")
            if options := expand_transform(step):
                lines.append("  options:")
                lines += [f"    {key}: {_inline(value)}" for key, value in options.items()]
        lines.append("rules:  # the first that matches a layer's name wins")
        for rule in self.rules:
            lines.append(f"- match: {_inline(rule.match)}")
            if rule.weight is None:
                lines.append(f"  weight: {KEEP}  # left as it is")
                continue
            lines.append(f"  weight: {rule.weight}  # {describe(rule.weight)}")
            lines.append(f"  method: {rule.method}")
            if options := expand(rule):
                lines.append("  options:")
                lines += [f"    {key}: {_inline(value)}" for key, value in options.items()]
            if rule.input is not None:
                lines.append(f"  input: {rule.input}  # of each token, {describe(rule.input)}")
        lines.append(f"kv: {{key: {self.kv.key}, value: {self.kv.value}}}  # what keys and values are kept in")
        if self.train is not None:
            lines.append(
                "train:  # on the grids that the rules' methods found: LSQ, distilled from the original"
            )
            lines += [f"  {key}: {_inline(value)}" for key, value in asdict(self.train).items()]
        rounded = any(rule.input is not None for rule in self.rules)
        inputs = "are quantized where a rule names their input" if rounded else "are not quantized"
        lines.append(f"# every layer that no rule matches is left as it is; activations {inputs}")
        return "\n".join(lines)


def names() -> list[str]:
    """The recipes that ship with labkit."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def needs(method: Callable[..., Any]) -> frozenset[str]:
    """What a method or transform asks for: ``{"hessian"}`` for GPTQ, nothing for RTN."""
    return frozenset(getattr(method, "needs", ()))


def defaults(method: Callable[..., Any]) -> dict[str, Any] | None:
    """A method's or transform's options and their defaults; None when it takes any (``**options``)."""
    parameters = inspect.signature(method).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name: p.default for p in parameters if p.name not in ("weight", "spec", "stats", "model")}


def expand(rule: Rule) -> dict[str, Any]:
    """A rule's options together with its method's defaults, by name; what is None is left out."""
    return _expand(METHODS.get(rule.method or ""), rule.options)


def expand_transform(step: Transform) -> dict[str, Any]:
    """A transform's options together with its defaults, by name; what is None is left out."""
    return _expand(TRANSFORMS.get(step.name), step.options)


def _expand(function: Callable[..., Any] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    known = defaults(function) if function is not None else None
    options = {**(known or {}), **given}
    return {key: options[key] for key in sorted(options) if options[key] is not None}


def describe(spec: QuantSpec) -> str:
    """A spec in words: who shares a scale, how scale and zero point are stored."""
    block = spec.block
    if isinstance(block, int):
        shared = f"each run of {block} weights"
    else:
        rows, columns = block
        row = {None: "all rows", 1: "each row"}.get(rows, f"each {rows} rows")
        shared = row if columns is None else f"{row}, {columns} columns"
    zero = {
        "none": "symmetric, no zero point",
        "int": f"one zero point, an integer of {spec.bits} bits",
        "float": "one zero point, a float",
        "mean": "less the mean of the tensor, a float",
    }[spec.zero]
    return f"{shared} share one {spec.scale} scale; {zero}"


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, not the last one's victory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _rule(tree: Any, where: str) -> Rule:
    _keys(tree, required={"match", "weight"}, optional={"method", "options", "input"}, where=where)
    match, weight, method, options = (tree.get(k) for k in ("match", "weight", "method", "options"))
    for key in (k for k in ("match", "weight", "input") if k in tree):
        if not isinstance(value := tree[key], str):
            raise ValueError(f"{where}: {key} must be a text, found {value!r}")
    if method is not None and not isinstance(method, str):
        raise ValueError(f"{where}: method must be a text, found {method!r}")
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"{where}: options must be a mapping of names to values, found {options!r}")
    try:
        spec = None if weight == KEEP else QuantSpec.parse(weight)
        grid = QuantSpec.parse(tree["input"]) if "input" in tree else None
        return Rule(match, spec, method, options or {}, grid)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _transform(tree: Any, where: str) -> Transform:
    _keys(tree, required={"name"}, optional={"options"}, where=where)
    name, options = tree["name"], tree.get("options")
    if not isinstance(name, str):
        raise ValueError(f"{where}: name must be a text, found {name!r}")
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"{where}: options must be a mapping of names to values, found {options!r}")
    return Transform(name, options or {})


def _keys(tree: Any, *, required: Collection[str] = (), optional: Collection[str] = (), where: str) -> None:
    known = ", ".join(sorted({*required, *optional}))
    if not isinstance(tree, dict):
        raise ValueError(f"{where}: expected a mapping with {known}, found {tree!r}")
    if unknown := set(tree) - {*required, *optional}:
        raise ValueError(
            f"{where}: unknown key {', '.join(map(repr, sorted(map(str, unknown))))}; known are {known}"
        )
    if missing := set(required) - set(tree):
        raise ValueError(f"{where}: {', '.join(sorted(missing))} missing; a recipe needs it")


def _inline(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
