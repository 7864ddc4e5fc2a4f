"""The trainings of a comparison, and the files that each one leaves."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Config = dict[str, Any]
Result = dict[str, Any]
TEACHER = "teacher"
RESULT, EVIDENCE, SAMPLES, POINTS = "result.json", "evidence.npz", "samples.npz", "points.npz"
"""What a finished training has: its numbers; and for pictures its test, its sample weights, its points in the plane."""


@dataclass(frozen=True)
class Job:
    """One training: a method at a seed."""

    method: str  # name in the recipe; "teacher" for the teacher, "teacher NAME" for one of several
    seed: int
    folder: Path
    config: Config  # for lit-kd fit
    is_teacher: bool = False
    teachers: tuple[str, ...] = ()  # the `method` of each teacher that it learns from
    wave: int = 0  # jobs of smaller waves must finish before this one starts
    project: str | None = None  # the W&B project that shows it, if any


def slug(name: str) -> str:
    """The folder name of a method.

    Examples:
        >>> slug("KD 0.5 + meta")
        'kd-0.5-meta'
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
