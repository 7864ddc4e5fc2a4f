"""Pages that need no other file: templates, style and scripts of this room, and pictures as sprite sheets."""

import base64
import io
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from lit_kd.models.files import write_whole
from lit_kd.version import __version__

SIDE = 16  # tiles in each direction of a sheet


class Sprites(NamedTuple):
    """Pictures as sheets of 16 x 16 tiles, which a page shows one tile at a time."""

    sheets: list[str]  # data URLs
    pictured: int  # pictures on them
    aspect: float  # width / height


def render(path: Path, template: str, **values: Any) -> None:
    """Write a page from a template of ``templates/``; texts among the values are escaped."""
    loader = PackageLoader("lit_kd", "report/templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.globals |= {"static": _static, "version": __version__}
    write_whole(path, environment.get_template(template).render(**values))


@cache
def _static(name: str) -> Markup:
    """A style or a script, to be written into a page as it is."""
    return Markup((files("lit_kd.report") / "static" / name).read_text(encoding="utf-8"))


def data_url(content: bytes, kind: str = "png") -> str:
    """A picture as an address that needs no file."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def sprites(pictures: npt.NDArray[np.uint8] | None, most: int) -> Sprites:
    """The first of the pictures ``(n, H, W, 3)``, as many as make sheets of at most so many bytes."""
    sheets: list[str] = []
    if pictures is None or not len(pictures):
        return Sprites(sheets, 0, 1.0)
    count, (height, width) = 0, pictures.shape[1:3]
    while count < len(pictures):
        tiles = np.zeros((SIDE * SIDE, height, width, 3), np.uint8)
        part = pictures[count : count + len(tiles)]
        tiles[: len(part)] = part
        sheet = tiles.reshape(SIDE, SIDE, height, width, 3).swapaxes(1, 2).reshape(SIDE * height, SIDE * width, 3)
        written = io.BytesIO()
        # lossy blocks of 16 x 16 would mix the tiles of small pictures
        Image.fromarray(sheet).save(written, "WEBP", lossless=height * width <= 28 * 28, quality=75)
        sheets.append(data_url(written.getvalue(), "webp"))
        most -= len(sheets[-1])
        if most < 0:
            sheets.pop()
            break
        count += len(part)
    return Sprites(sheets, count, width / height)
