"""Whether a config's options exist, as far as sources tell: before torch and Lightning are imported.

What is not certainly wrong passes; the parser has the last word.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from lit_kd.cli.source import Options, accepted, arguments_of, exported, find, objection, options_of
from lit_kd.models.files import parse_yaml

TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
FIXED = {"trainer": TRAINER, "checkpoint": "lit_kd.report.callbacks.BestAndLast", "show": "lit_kd.report.show.ShowRun"}
"""The classes of the parts whose class cannot be chosen."""
CHOSEN = {"model": ("a method", "lit_kd.methods", ""), "data": ("a data module", "lit_kd.data", "DataModule")}
"""What the others are, where those of ours are, and how their names end."""
BASES = ("Distiller", "DataModule")
LIGHTNINGS = {"seed_everything", "config", "print_config", "help"}
"""Options that are no part and no argument of the trainer's method."""
LINE = "--"
"""Where an option of the command line is set."""
LEVELS = {"class_path", "init_args"}
"""Words of a path that name no option."""


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
    if path and not (isinstance(content, dict) and content):
        yield Mention(path, content, where)
    if isinstance(content, dict):
        for key, value in content.items():
            inner = tuple(part for part in str(key).rstrip("+").split(".") if part not in LEVELS)
            if "dict_kwargs" not in inner:
                yield from in_config(value, where, (*path, *inner))
    elif isinstance(content, list):
        for i, value in enumerate(content):
            yield from in_config(value, where, (*path, str(i)))


def in_word(word: str, after: str) -> Iterator[Mention]:
    """What a word of a command line sets.

    Args:
        word: It; only an option sets something.
        after: The next one, its value if there is none behind ``=``; empty if there is none.
    """
    option, equals, value = word.partition("=")
    path = [part for part in option[2:].rstrip("+").split(".") if part not in LEVELS]
    if path[-1:] == ["help"]:
        path = path[:-1]  # of that class
    if word.startswith("--") and all(path) and path and "dict_kwargs" not in path:
        given = value if equals else None if after.startswith("--") else after or None
        yield from in_config(_plain(given) if given and given[0] in "{[" else given, LINE, tuple(path))


def check_options(command: str, given: Iterable[Mention], whole: bool) -> None:
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
    if "lightning" in sys.modules or "JSONARGPARSE_DEFAULT_ENV" in os.environ:
        return
    with contextlib.suppress(RecursionError):  # a config or a source that refers to itself
        mentions = list(given)
        if not any(mention.path == ("config",) and mention.where != LINE for mention in mentions):  # one within another
            _check_options(command, mentions, whole)


def _check_options(command: str, given: Sequence[Mention], whole: bool) -> None:
    for part, (what, *_) in CHOSEN.items():
        if whole and not any(mention.path[0] == part for mention in given):
            example = "lit-kd fit --config methods/kd.yaml --config data/digits.yaml"
            raise ValueError(f"expected {what}, found no --{part}: name one, or a config that does, as in {example}")
    foreign = any(_is_foreign(mention.value) for mention in given)
    classes: dict[tuple[str, ...], list[str | None]] = {(part,): [name] for part, name in FIXED.items()}
    for mention in given:
        if not isinstance(mention.value, dict):
            classes.setdefault(mention.path, []).append(_class(mention, foreign))
    for mention in given:
        # of every class that the option may be of, or lie within
        owners = [owner for i in range(1, len(mention.path)) for owner in classes.get(mention.path[:i], ())]
        if None not in owners:
            _check(command, mention, [owner or "" for owner in classes.get(mention.path[:-1], ())])
    for place, names in classes.items():
        if len(place) == 1 and len({*names}) == 1 and names[0] is not None:
            _check_values(names[0], place, [mention for mention in given if mention.path[:-1] == place])


def _check(command: str, mention: Mention, owners: list[str]) -> None:
    """Refuse what no class that is named for its place takes."""
    *place, name = mention.path
    options = [_options(owner) for owner in owners] if place else [_of_command(command)]
    known = [each for each in options if each is not None]
    if not known or len(known) < len(options) or name.isdigit():  # a number is a place in a list
        return
    takers = [each[name] for each in known if name in each]
    if not takers:
        owner = owners[-1].rpartition(".")[2] if place else f"lit-kd {command}"
        near = difflib.get_close_matches(name, known[-1], n=1)
        told = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(sorted(known[-1]))}"
        raise ValueError(f"{mention}: {owner} has no option {name}: {told}")
    allowed = [accepted(annotation) for annotation in takers]
    if None not in allowed and not any(_fits(mention.value, each) for some in allowed for each in some or ()):
        words = {float: "a number", bool: "true or false", None: "null"}
        found = dict.fromkeys(words.get(each, str(each)) for each in allowed[-1] or ())
        raise ValueError(f"{mention}: expected {', '.join(found)}; found {mention.value!r}")


def _check_values(owner: str, place: tuple[str, ...], given: list[Mention]) -> None:
    """Refuse what the constructor of a class of ours would."""
    options, values, unknown = _options(owner), {}, set()
    if options is None or not owner.startswith("lit_kd."):
        return
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


def _is_foreign(value: Any) -> bool:
    """Whether it looks like the path of a class of the user's: its module may bring others, that go by short names."""
    parts = value.split(".") if isinstance(value, str) else [""]
    return len(parts) > 1 and all(map(str.isidentifier, parts)) and parts[0] not in ("lit_kd", "lightning", "torch")


def _class(mention: Mention, foreign: bool) -> str | None:
    """The path of the class that a value names, of one of ours also by its short name; None if that is not known.

    Raises:
        ValueError: If a method or data module is none of ours, and no path.
    """
    name = mention.value
    if not isinstance(name, str) or os.path.exists(name):
        return None
    if len(mention.path) > 1 or mention.path[0] not in CHOSEN or not name.isidentifier():
        return name if _options(name) is not None else None
    what, module, ending = CHOSEN[mention.path[0]]
    known = [each for each in exported(module) if each.endswith(ending) and each not in BASES]
    if name in known:
        return f"{module}.{name}"
    if foreign or name in BASES or _plain(name) is None:
        return None
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
