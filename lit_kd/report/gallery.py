"""The page of an audit: a heat map of given and suggested classes, and a gallery to decide in."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_kd.report.label_issues import LabelIssues
from lit_kd.report.render import render, sprites

PAGE = 4_800_000
"""Bytes of a page; pictures fill what its numbers leave, and get at least a quarter."""


def write_gallery(
    path: Path,
    issues: LabelIssues,
    pictures: npt.NDArray[np.uint8] | None,
    class_names: Sequence[str] | None,
    title: str,
) -> None:
    """Write the page in which somebody decides which labels stay; it needs no other file.

    Args:
        path: Of the page; a file that is there is replaced.
        issues: The rows, the least believed label first.
        pictures: Of the first rows, in their order, ``(m, H, W, 3)`` with ``m <= n``; ``None``: rows show their ids.
        class_names: A name for each class; ``None``: their numbers.
        title: The page's heading.
    """
    classes = 1 + int(max(issues.given.max(initial=0), issues.suggested.max(initial=0)))
    names = list(class_names) if class_names else [str(number) for number in range(classes)]
    if len(names) < classes:
        raise ValueError(f"expected a name for each of {classes} classes, found {len(names)}: {names}")
    if pictures is not None and len(pictures) > len(issues.ids):
        raise ValueError(f"expected a picture a row at most, found {len(pictures)} for {len(issues.ids)} rows")
    told = "\0".join([*issues.ids, *map(str, issues.given.tolist())])
    data: dict[str, Any] = {
        "key": hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()[:16],  # of what the browser remembers
        "names": names,
        "ids": issues.ids,
        **{name: getattr(issues, name).tolist() for name in ("index", "given", "suggested")},
        "score": _rounded(issues.score),
        "flagged": issues.is_issue.astype(int).tolist(),
        "true": None if issues.true is None else issues.true.tolist(),
        "weights": None,
    }
    if issues.weights is not None and issues.weights.shape[1] > 1:
        data["weights"] = [_rounded(issues.weights[:, 0]), _rounded(issues.weights[:, 1:].sum(1))]
    sheets = sprites(pictures, max(PAGE // 4, PAGE - len(json.dumps(data))))
    data |= {"pictured": sheets.pictured, "aspect": sheets.aspect}
    render(
        path,
        "audit.html",
        title=title,
        data=data,
        sheets=sheets.sheets,
        numbers=_numbers(issues),
        probable=issues.probable,
        note=issues.note,
    )


def _rounded(values: npt.NDArray[Any]) -> list[float | None]:
    """JSON knows no NaN."""
    return [round(value, 4) if np.isfinite(value) else None for value in values.tolist()]


def _numbers(issues: LabelIssues) -> list[tuple[str, str]]:
    """The verdict: three numbers, each with what it means."""
    flagged, total = int(issues.is_issue.sum()), len(issues.ids)
    if not issues.probable:
        return [(f"{total:,}", "labels, ranked by their learned weights, which are no probabilities")]
    doubt = 1 - issues.score[issues.is_issue]
    share = f"of {total:,} labels flagged ({flagged / max(1, total):.1%})"
    wrong = "of the flagged labels are expected to be wrong"
    found = [(f"{flagged:,}", share), (f"{np.nansum(doubt):,.0f}", wrong)]
    if issues.true is None:
        return [
            *found,
            (f"{1 - np.nanmean(issues.score):.1%}" if total else "–", "of all labels are expected to be wrong"),
        ]
    known = issues.true >= 0
    truly = (issues.true != issues.given) & known
    right = f"of the flagged labels are wrong indeed, of {int(truly.sum()):,} wrong ones in all"
    return [*found, (f"{int((truly & issues.is_issue).sum()):,}", right)]
