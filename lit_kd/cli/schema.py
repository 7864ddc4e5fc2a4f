"""The command ``lit-kd schema``: JSON schemas, by which editors complete and check configs and recipes."""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import lit_kd.methods  # noqa: F401 - so that jsonargparse knows all methods
from lit_kd.data import DataModule
from lit_kd.distiller.base import Distiller
from lit_kd.report.show import ShowRun

Schema = dict[str, Any]
# Options that take classes of other packages, whose own options change with their versions: anything goes.
_FOREIGN = {
    "model": {"mix", "metrics", "optimizer"},
    "data": {"inner"},
    "trainer": {"accelerator", "callbacks", "logger", "plugins", "profiler", "strategy"},
}


def schema(args: Sequence[str]) -> None:
    """Run ``lit-kd schema`` with the command line after it."""
    parser = argparse.ArgumentParser(
        "lit-kd schema",
        description="Print a JSON schema, by which editors complete and check configs: of lit-kd fit, or of recipes.",
    )
    parser.add_argument("kind", choices=["fit", "recipe"], nargs="?", default="fit", help="default: fit")
    kind = parser.parse_args(args).kind
    print(json.dumps(fit_schema() if kind == "fit" else recipe_schema(), indent=1))


def fit_schema() -> Schema:
    """What ``lit-kd fit --config`` reads: lit_kd's methods, data modules and terms, and Lightning's options.

    Nothing is required, as configs are merged. Classes of your own, and of other packages, may have any options.
    """
    parser = ArgumentParser(description="A config of lit_kd, for lit-kd fit.")
    parser.add_argument("--seed_everything", type=bool | int, help="The seed of every random choice.", default=0)
    parser.add_subclass_arguments(Distiller, "model", skip=_FOREIGN["model"])
    parser.add_subclass_arguments(DataModule, "data", skip=_FOREIGN["data"])
    parser.add_class_arguments(Trainer, "trainer", skip=_FOREIGN["trainer"])
    parser.add_class_arguments(ModelCheckpoint, "checkpoint")
    parser.add_class_arguments(ModelCheckpoint, "last")
    parser.add_class_arguments(ShowRun, "show")
    parser.add_argument("--ckpt_path", type=str | None, help="A checkpoint to go on from.")
    parser.add_argument("--weights_only", type=bool | None, help="Whether checkpoints may hold plain values only.")
    found: Schema = json.loads(parser.get_completion_script("jsonschema"))
    for part in ("model", "data"):
        found["properties"][part].pop("default", None)
    for node in _objects(found):
        node.get("properties", {}).pop("$schema", None)
        if node.get("required") != ["class_path"]:
            node.pop("required", None)
    found["properties"]["$schema"] = {"type": "string"}
    found["properties"]["trainer"]["properties"] |= {name: {} for name in sorted(_FOREIGN["trainer"])}
    found["$defs"] = dict(sorted(found["$defs"].items()))
    for name, definition in found["$defs"].items():
        part = {"Distiller": "model", "DataModule": "data"}.get(name, "")
        if "anyOf" in definition:
            found["$defs"][name] = _classes(definition["anyOf"], sorted(_FOREIGN.get(part, ())))
    return _shared(found)


def recipe_schema() -> Schema:
    """What ``lit-kd compare`` reads; it refers to `fit_schema`, as the file ``fit.schema.json`` beside it."""
    fit, partly = "fit.schema.json", {"type": "object", "properties": {"class_path": False}}
    parts: Schema = {
        "model": {"anyOf": [{"$ref": f"{fit}#/$defs/Distiller"}, partly]},
        "data": {"anyOf": [{"$ref": f"{fit}#/$defs/DataModule"}, partly]},
        "trainer": {"$ref": f"{fit}#/properties/trainer"},
    }
    names = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    one = parts | {"teacher": names | {"description": "By name, one or some of the teachers above; []: none."}}
    several = {"type": "object", "minProperties": 1, "additionalProperties": _object(one)}
    seeds = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}, "default": [0, 1, 2]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "description": "A recipe of lit_kd, for lit-kd compare.",
        **_object(
            {
                "$schema": {"type": "string"},
                "name": {"type": "string", "description": "Of the results' folder; by default the file's."},
                "seeds": seeds,
                "defaults": _object(parts) | {"description": "What all trainings share."},
                "teacher": _object(parts) | {"description": "The teacher's training: what differs from the defaults."},
                "teachers": several | {"description": "Several teachers by name, in the place of teacher."},
                "methods": several | {"description": "Trainings by name: what differs from the defaults."},
            }
        ),
        "required": ["methods"],
    }


def _object(properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _objects(node: Any) -> Iterator[Schema]:
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _objects(child)


def _classes(variants: list[Schema], free: Sequence[str]) -> Schema:
    """Our classes, by their last name too, and any other class with any options."""
    by_path = {variant.get("properties", {}).get("class_path", {}).get("const", ""): variant for variant in variants}
    kept, known = [], []
    for path, variant in sorted(by_path.items()):
        if path.startswith("lit_kd.") and path.count(".") < 3:  # a room exports it
            names = [path.split(".")[-1], path]
            variant["properties"]["class_path"] = {"enum": names}
            variant["properties"].setdefault("init_args", _object({}))["properties"] |= {name: {} for name in free}
            kept.append(variant)
            known += names
    class_path = {"type": "string", "not": {"enum": known}}
    other = {"type": "object", "required": ["class_path"], "properties": {"class_path": class_path}}
    return {"anyOf": [{"type": "string"}, *kept, other]}


def _shared(found: Schema) -> Schema:
    """The same with options that many classes have in one place, ``$defs``."""
    every = [node["properties"] for node in _objects(found) if isinstance(node.get("properties"), dict)]
    every = [options for options in every if "init_args" not in options]
    counts = Counter((name, json.dumps(option)) for options in every for name, option in options.items())
    numbers: Counter[str] = Counter()
    names = {}
    for key, count in counts.items():
        if count > 2 and len(key[1]) > 60:  # else a reference is no shorter
            numbers[key[0]] += 1
            names[key] = f"{key[0]}-{numbers[key[0]]}"
    for options in every:
        for name, option in options.items():
            place = names.get((name, json.dumps(option)))
            if place:
                found["$defs"][place] = option
                options[name] = {"$ref": f"#/$defs/{place}"}
    return found
