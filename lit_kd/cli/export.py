"""The command ``lit-kd export``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lit_kd.models.checkpoint import read_student
from lit_kd.models.export import export_student
from lit_kd.models.files import EXPORTS


def main(args: Sequence[str]) -> None:
    """Run ``lit-kd export`` with the command line after it."""
    parser = argparse.ArgumentParser(
        "lit-kd export",
        description="Write a checkpoint's student alone, with class names and input shape in the file's metadata, and "
        "check that it gives the same logits.",
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of a lit_kd run")
    parser.add_argument("--format", choices=EXPORTS, required=True)
    parser.add_argument("--output", type=Path, help="default: the checkpoint's path with the format's suffix")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    parser.add_argument("--input_shape", type=int, nargs="+", help="where the checkpoint does not tell: 3 32 32, e.g.")
    options = parser.parse_args(args)
    suffix = EXPORTS[options.format]
    output: Path = options.output or options.checkpoint.with_suffix(suffix)
    if output.suffix != suffix:
        raise ValueError(f"expected a path that ends in {suffix} for {options.format}, found {output}")
    student = read_student(options.checkpoint)
    shape = options.input_shape or student.input_shape
    if shape is None:
        raise ValueError(f"{options.checkpoint}: expected the shape of an input, found none: give --input_shape")
    apart = export_student(
        student.model,
        output,
        options.format,
        input_shape=shape,
        class_names=student.class_names,
        image_input=student.image_input,
        name=student.name,
        overwrite=options.overwrite,
    )
    print(f"{student.name} written to {output}: logits differ by at most {apart:.1e}")
