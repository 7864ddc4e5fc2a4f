"""The commands ``lit-kd export`` and ``lit-kd predict CHECKPOINT IMAGES``: what a finished student is used for."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from lit_kd.models.checkpoint import read_student
from lit_kd.models.export import export_student
from lit_kd.models.files import EXPORTS, check_new, write_columns
from lit_kd.models.images import image_files
from lit_kd.models.predict import predict_images


def export(args: Sequence[str]) -> None:
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
    output: Path = options.output or options.checkpoint.with_suffix(EXPORTS[options.format])
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


def predict(args: Sequence[str]) -> None:
    """Run ``lit-kd predict`` on a directory of images, with the command line after it."""
    parser = argparse.ArgumentParser(
        "lit-kd predict",
        description="Classify the images of a directory and write file, class and probability. Images are resized, "
        "cropped and normalised as in the evaluation of the training. For the test rows of the training's data: lit-kd "
        "predict --config config.yaml --ckpt_path CHECKPOINT.",
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of a lit_kd run on images")
    parser.add_argument("images", type=Path, help="a directory; subfolders are searched too")
    parser.add_argument("--output", type=Path, default=Path("predictions.csv"), help="default: predictions.csv")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    options = parser.parse_args(args)
    check_new(options.output, options.overwrite)
    files, others = image_files(options.images)
    student = read_student(options.checkpoint)
    predictions = predict_images(student, files)
    done = list(track(predictions, "predict", len(files), console=Console(stderr=True), transient=True))
    read = [found for found in done if not found.unreadable]
    for found in done:
        if found.unreadable:
            print(f"skipped {found.file}: {found.unreadable}", file=sys.stderr)
    if not read:
        raise ValueError(f"{options.images}: expected images, found none of {len(files)} files readable")
    names = student.class_names or range(student.num_classes)
    columns: dict[str, list[Any]] = {
        "file": [found.file.relative_to(options.images).as_posix() for found in read],
        "class": [names[found.label] for found in read],
        "probability": [round(found.probability, 6) for found in read],
    }
    write_columns(options.output, columns, options.overwrite)
    left = f"{len(done) - len(read)} unreadable, {len(others)} other files left out"
    print(f"{len(read)} images classified, written to {options.output}; {left}")
