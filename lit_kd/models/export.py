"""The student alone, in formats that other programs read."""

import copy
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_kd.models.files import EXPORTS, check_unused, optional, write_whole
from lit_kd.models.images import ImageInput
from lit_kd.models.subclasses import Subclassed
from lit_kd.models.taps import Composite
from lit_kd.types import check_choice, evaluating, logits_of
from lit_kd.version import __version__

TOLERANCE = 1e-5
"""Largest difference of logits, relative to the largest logit if that is above 1."""


def export_student(
    student: nn.Module,
    path: str | Path,
    format: str,
    *,
    input_shape: Sequence[int],
    class_names: Sequence[str] | None = None,
    image_input: ImageInput | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> float:
    """Write a student, from inputs ``(B, *input_shape)`` to its logits, after a trial run of what is written.

    Inputs are numbers, or where the first layer is an `nn.Embedding`, tokens, as many as `input_shape` says.

    `format` is ``"onnx"``, ``"torch_export"`` or ``"safetensors"``; the last holds weights only, for
    `lit_kd.models.build_model`. The other arguments become JSON texts in the file's metadata, with ``composite`` for
    students of SimKD and LELP, which `lit_kd.models.checkpoint.completed` makes of the network that is named.

    Returns the largest difference between the logits of file and student for random inputs.
    """
    path = Path(path)
    check_choice("format", format, EXPORTS)
    if path.suffix != EXPORTS[format]:
        raise ValueError(f"expected a path that ends in {EXPORTS[format]} for {format}, found {path}")
    check_unused(path, overwrite)
    facts = {
        "class_names": list(class_names) if class_names else None,
        "input_shape": list(input_shape),
        "image_input": asdict(image_input) if image_input else None,
        "student": name,
        "lit_kd": __version__,
    }
    if isinstance(student, (Composite, Subclassed)):
        facts["composite"] = student.spec
    texts = {key: json.dumps(fact) for key, fact in facts.items()}
    network = _Logits(copy.deepcopy(student).cpu())
    draw = torch.Generator().manual_seed(0)
    first = next((m for m in student.modules() if any(True for _ in m.parameters(recurse=False))), None)
    if isinstance(first, nn.Embedding):  # it reads tokens
        inputs = [torch.randint(first.num_embeddings, (rows, *input_shape), generator=draw) for rows in (2, 1, 5)]
    else:
        inputs = [torch.randn(rows, *input_shape, generator=draw) for rows in (2, 1, 5)]
    with torch.no_grad(), evaluating(network):
        expected = [network(x) for x in inputs]
        try:
            content, run = _EXPORTERS[format](network, inputs[0], texts)
            found = [run(x) for x in inputs]
        except ImportError:
            raise
        except Exception as error:  # an exporter or runtime may raise anything for an operator that it does not know
            told = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"this student cannot be exported as {format}: {type(error).__name__}: {told}") from error
    apart = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    if not apart <= TOLERANCE * max(1.0, *(float(logits.abs().max()) for logits in expected)):
        raise ValueError(f"expected the {format} file to give the student's logits, found a difference of {apart:.2g}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
    return apart


class _Logits(nn.Module):
    """The network with plain logits."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.student, x)


# from the network, an example input and the metadata to the file's content, and a function that runs that content
Run = Callable[[Tensor], Tensor]
Exporter = Callable[[_Logits, Tensor, Mapping[str, str]], tuple[bytes, Run]]


def _torch_export(network: _Logits, x: Tensor, texts: Mapping[str, str]) -> tuple[bytes, Run]:
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=dict(texts))
    return file.getvalue(), torch.export.load(io.BytesIO(file.getvalue())).module()


def _onnx(network: _Logits, x: Tensor, texts: Mapping[str, str]) -> tuple[bytes, Run]:
    runtime = optional("onnxruntime", "export", "this format")
    optional("onnxscript", "export", "this format")  # which torch's exporter needs
    program = torch.onnx.export(
        network,
        (x,),
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )
    assert program is not None  # as no file is given
    program.model.metadata_props.update(texts)
    content = program.model_proto.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda x: torch.from_numpy(session.run(["logits"], {"input": x.numpy()})[0])


def _safetensors(network: _Logits, x: Tensor, texts: Mapping[str, str]) -> tuple[bytes, Run]:
    safetensors = optional("safetensors.torch", "export", "this format")
    # cloned, as the format knows no weights that layers share
    weights = {key: weight.clone().contiguous() for key, weight in network.student.state_dict().items()}
    content: bytes = safetensors.save(weights, dict(texts))
    again = copy.deepcopy(network)
    again.student.load_state_dict(safetensors.load(content))
    return content, again


_EXPORTERS: dict[str, Exporter] = {"onnx": _onnx, "torch_export": _torch_export, "safetensors": _safetensors}
