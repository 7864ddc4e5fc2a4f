"""Whether a config's options exist, as far as sources tell: before torch and Lightning are imported."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from lit_kd.files import parse_yaml
from lit_kd.source import Options, accepted, arguments_of, exported, find, objection, options_of

TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
FIXED = {"trainer": TRAINER, "checkpoint": "lit_kd.callbacks.BestAndLast", "show": "lit_kd.show.ShowRun"}
"""The classes of the parts whose class cannot be chosen."""
CHOSEN = {"model": ("a method", "lit_kd.methods", ""), "data": ("a data module", "lit_kd.data", "DataModule")}
"""What the others are, where those of ours are, and how their names end."""
LIGHTNINGS = {"seed_everything", "config", "c", "print_config", "help"}
"""Options that are no part and no argument of the trainer's method."""


class Mention(NamedTuple):
    """An option and what it is set to; where a class is chosen it has the path of the class."""

    path: tuple[str, ...]
    value: Any
    where: str

    def __str__(self) -> str:
        return f"{self.where}{'.'.join(self.path)}"


def in_config(content: Any, where: str, path: tuple[str, ...] = ()) -> Iterator[Mention]:
    """What a config, or a part of it, sets.

    Args:
        content: The YAML's value.
        where: Its name, for messages.
        path: Of the part.
    """
    if isinstance(content, dict) and content.keys() & {"class_path", "init_args"}:
        if isinstance(content.get("class_path"), str):
            yield Mention(path, content["class_path"], where)
        content = content.get("init_args")
    elif path:
        yield Mention(path, content, where)
    if isinstance(content, dict):
        for key, value in content.items():
            yield from in_config(value, where, (*path, str(key)))
    elif isinstance(content, list):
        for i, value in enumerate(content):
            yield from in_config(value, where, (*path, str(i)))


def in_word(word: str, after: str | None) -> Iterator[Mention]:
    """What a word of a command line sets.

    Args:
        word: It; only an option sets something.
        after: The next one, its value if there is none behind ``=``.
    """
    option, equals, value = word.partition("=")
    path = tuple(part for part in option[2:].rstrip("+").split(".") if part not in ("init_args", "class_path"))
    if path[-1:] == ("help",):
        path = path[:-1]  # of that class
    if word.startswith("--") and path and "dict_kwargs" not in path:
        given = value if equals else None if after is None or after.startswith("--") else after
        yield from in_config(_plain(given) if given and given[0] in "{[" else given, "--", path)


def check_options(command: str, given: Sequence[Mention], whole: bool) -> None:
    """Refuse options and classes that certainly do not exist, and values that are certainly none of theirs.

    Where Lightning is imported already, as by a script with classes of its own, which then go by their short names too,
    nothing is won and nothing checked.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        given: All that is set, in this order.
        whole: Whether nothing may be missing.

    Raises:
        ValueError: If there is one.
    """
    if "lightning" in sys.modules:
        return
    if whole:
        for part, (what, *_) in CHOSEN.items():
            if not any(mention.path[0] == part for mention in given):
                example = "lit-kd fit --config methods/kd.yaml --config data/digits.yaml"
                raise ValueError(
                    f"expected {what}, found no --{part}: name one, or a config that does, as in {example}"
                )
    classes: dict[tuple[str, ...], list[str]] = {(part,): [name] for part, name in FIXED.items()}
    for mention in given:
        if isinstance(mention.value, str):
            classes.setdefault(mention.path, []).append(_class(mention))
    for mention in given:
        _check(command, mention, classes.get(mention.path[:-1], []))
    for place, names in classes.items():
        if len({*names}) == 1 and names[0].startswith("lit_kd."):
            _check_values(names[0], place, [mention for mention in given if mention.path[:-1] == place])


def _check(command: str, mention: Mention, owners: list[str]) -> None:
    """Refuse what no class that is named for its place takes."""
    *place, name = mention.path
    options = [_options(owner) for owner in owners] if place else [_of_command(command)]
    known = [each for each in options if each is not None]
    if not known or len(known) < len(options):
        return
    takers = [each[name] for each in known if name in each]
    if not takers:
        owner = owners[-1].rpartition(".")[2] if place else f"lit-kd {command}"
        near = difflib.get_close_matches(name, known[-1], n=1)
        ask = f"--{place[0]}.help {owner}" if place[:1] == ["model"] or place[:1] == ["data"] else "--help"
        told = f"did you mean {near[0]}?" if near else f"lit-kd {command} {ask} lists its options"
        raise ValueError(f"{mention}: {owner} has no option {name}: {told}")
    allowed = [accepted(annotation) for annotation in takers]
    if None not in allowed and not any(_fits(mention.value, each) for some in allowed for each in some or ()):
        words = {float: "a number", bool: "true or false", None: "null"}
        found = dict.fromkeys(words.get(each, str(each)) for each in allowed[-1] or ())
        raise ValueError(f"{mention}: expected {', '.join(found)}; found {mention.value!r}")


def _check_values(owner: str, place: tuple[str, ...], given: list[Mention]) -> None:
    """Refuse what the constructor of a class of ours would."""
    options, values, unknown = _options(owner) or {}, {}, set()
    for name, value in {mention.path[-1]: mention.value for mention in given}.items():
        allowed = accepted(options.get(name))
        if allowed is None:
            unknown.add(name)
        else:
            values[name] = _plain(value) if isinstance(value, str) else value
            if float in allowed and isinstance(values[name], str):
                with contextlib.suppress(ValueError):
                    values[name] = float(values[name])  # in YAML 1e-3 is text
    told = objection(find(owner), values, unknown)
    if told is not None:
        raise ValueError(f"{'.'.join(place)}: {told}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value may be of a kind, see `accepted`: in doubt it may."""
    if isinstance(value, str):
        if value == str(kind):
            return True
        value = _plain(value)
    if value is None or value == kind:
        return True
    if isinstance(value, str) and kind is float:
        try:
            float(value)
        except ValueError:
            return False
        return True
    return kind in (float, bool) and isinstance(value, (bool, int, float))


def _plain(text: str) -> Any:
    try:
        return parse_yaml(text, "")
    except ValueError:
        return text


def _class(mention: Mention) -> str:
    """The path of a class: of one of ours by its short name.

    Raises:
        ValueError: If a method or data module is none of ours, and no path.
    """
    name = str(mention.value)
    if mention.path[0] not in CHOSEN or len(mention.path) > 1 or not name.isidentifier():
        return name
    what, module, ending = CHOSEN[mention.path[0]]
    known = [each for each in exported(module) if each.endswith(ending)]
    if name in known or name in ("Distiller", "DataModule"):
        return f"{module}.{name}"
    near = difflib.get_close_matches(name, known, n=1)
    told = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}, and paths such as package.Class"
    raise ValueError(f"{mention}: expected {what}, found {name}: {told}")


@cache
def _options(name: str) -> Options | None:
    return options_of(find(name))


@cache
def _of_command(command: str) -> Options | None:
    arguments = arguments_of(find(TRAINER), command)
    if not arguments:
        return None
    names = LIGHTNINGS | {*FIXED, *CHOSEN} | {*arguments}
    names -= {"self", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
    return dict.fromkeys(sorted(names))
