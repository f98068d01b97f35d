"""The files that a student is exported to: what each holds, and how each is run."""

import importlib
import io
import json
import logging
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.description import Description, read
from ..errors import UserError
from ..hosts.adapter import reason_of
from ..run.checkpoint import SAFE, safe_content
from .load import KEY, find_student, make

ONNX, TORCH = ".onnx", ".pt2"

SUFFIXES = {"safetensors": SAFE, "onnx": ONNX, "torch": TORCH}
"""Formats, by the word of `deepkd export --to`."""

DESCRIPTION = "student.json"
"""The extra file of an exported program of torch that says what it is."""

Run = Callable[[Tensor], Tensor]
"""Images (B, 3, size, size) to logits (B, C), on the CPU."""


def content(network: nn.Module, about: Description, to: str) -> bytes:
    """Return the bytes of a student's file in one of SUFFIXES.

    Programs take a batch of any length, `image`, and give `logits`. Raises UserError if a network cannot be exported.
    """
    if to == "safetensors":
        return safe_content(network.state_dict(), about.strings())
    program = _program(network, about)
    if to == "onnx":
        return _onnx_content(program, about)
    file = io.BytesIO()
    described = json.dumps(asdict(about), ensure_ascii=False, indent=1)
    torch.export.save(program, file, extra_files={DESCRIPTION: described})
    return file.getvalue()


def opened(path: Path, trust: bool) -> tuple[Description, Run]:
    """Open a student in any form: an exported file, a run's student file, a run's folder.

    Raises UserError for a file that is none, that says nothing of its classes, or that could run code: torch's reader
    of programs evaluates expressions that are in the file, so such a file needs `trust`.
    """
    if path.suffix == ONNX:
        session = _session(path)
        about = read(session.get_modelmeta().custom_metadata_map, path)
        return _described(about, path), lambda images: _run_onnx(session, images)
    if path.suffix == TORCH:
        about = _described(_description_of_program(path), path)
        if not trust:
            raise UserError(
                f"{path}: is a program of torch, and torch's reader of them can be made to run code that is in the "
                f"file; if it is yours, allow it by --trust"
            )
        return about, program_of(path)
    found = find_student(path, trust=trust)
    network = make(found, trust=trust)
    return found.description, network


def program_of(path: Path) -> Run:
    """Read an exported program of torch, by torch's own reader, which trusts the file."""
    try:
        with _quiet():
            program = torch.export.load(path).module()
    except Exception as error:  # a damaged file can raise nearly anything
        raise UserError(f"{path}: is no exported program that this torch can read ({reason_of(error)})") from None
    run: Run = program
    return run


def onnx_of(path: Path) -> Run:
    """Read an ONNX file by onnxruntime."""
    session = _session(path)
    return lambda images: _run_onnx(session, images)


def _program(network: nn.Module, about: Description) -> Any:
    images = torch.zeros(2, 3, about.size, about.size)
    try:
        with _quiet():
            program = torch.export.export(
                network, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
            )
    except Exception as error:  # anybody's network may fail in any way
        raise UserError(f"the network {about.architecture} cannot be exported ({reason_of(error)})") from None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # which names files of this machine
    return program


def _onnx_content(program: Any, about: Description) -> bytes:
    needed("onnxscript")
    onnx = needed("onnx")
    try:
        with _quiet():
            exported: Any = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=["image"], output_names=["logits"]
            )
        proto = exported.model_proto
        onnx.helper.set_model_props(proto, about.strings())
        data: bytes = proto.SerializeToString()
    except Exception as error:  # the exporter's errors have no base class in common
        raise UserError(f"the network {about.architecture} cannot be exported to ONNX ({reason_of(error)})") from None
    return data


def _session(path: Path) -> Any:
    runtime = needed("onnxruntime")
    if not path.is_file():
        raise UserError(f"{path}: no such file; {KEY} must name a run's folder or a student's file")
    try:
        return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no base class in common
        raise UserError(f"{path}: onnxruntime cannot read it ({reason_of(error)})") from None


def _run_onnx(session: Any, images: Tensor) -> Tensor:
    (given,) = session.get_inputs()
    logits = session.run(None, {given.name: images.numpy()})[0]
    return torch.from_numpy(logits)


def _description_of_program(path: Path) -> Description | None:
    """Read what an exported program of torch says of itself, without torch's reader."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/extra/{DESCRIPTION}")]
            text = archive.read(names[0]).decode() if names else "{}"
        parts = dict(json.loads(text))
    except OSError as error:
        raise UserError(f"{path}: {KEY} must name a file that can be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged archive makes zipfile raise nearly anything
        raise UserError(f"{path}: is no exported program ({reason_of(error)})") from None
    return read({name: part if isinstance(part, str) else json.dumps(part) for name, part in parts.items()}, path)


def _described(about: Description | None, path: Path) -> Description:
    if about is None:
        raise UserError(f"{path}: does not say what its images and classes are; deepkd export writes files that do")
    return about


def needed(module: str) -> Any:
    """Import a module of the extra [onnx]; UserError, with what brings it, if it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f'ONNX needs {module}, which cannot be imported ({error}); pip install -e ".[onnx]" brings it'
        ) from None


class _quiet(warnings.catch_warnings):  # noqa: N801 (used like a function)
    """Keep the exporters' own messages, which are of their inside, off the terminal."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        self.level = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *error: Any) -> None:
        logging.disable(self.level)
        super().__exit__(*error)
