"""Export a student, and compare what the file gives with what the network gives before the file gets its name."""

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from .. import data
from ..data.description import Description
from ..errors import UserError
from ..run.checkpoint import fit_weights, write_whole
from .formats import SUFFIXES, Run, content, onnx_of, program_of
from .images import files_of, prepared
from .load import Found, make, read_config

TOLERANCE = 1e-4
"""How far an exported logit may be from the network's, of 1 or of the largest logit, whichever is more."""

REAL = 16
"""How many real images are compared, at most."""


def real_images(found: Found, paths: Sequence[Path], options: Sequence[str], trust: bool) -> Tensor:
    """Return images to compare on, (N, 3, size, size): of `paths`, else of the test images of the student's run.

    options: KEY VALUE pairs for the run's config. Raises UserError if there are none.
    """
    if paths:
        return torch.stack([prepared(path, found.description) for path in files_of(paths)[:REAL]])
    if found.folder is None:
        raise UserError(f"{found.weights}: is in no run's folder, so --images must name images to compare on")
    try:
        loader, _ = data.get_test_set(read_config(found.folder, options, trust))
    except UserError as error:
        raise UserError(f"{error}; --images can name other images to compare on") from None
    samples: Any = loader.dataset
    count = min(REAL, len(samples))
    batch = [samples[i * (len(samples) - 1) // max(count - 1, 1)] for i in range(count)]
    collate = getattr(loader, "collate_fn", None) or default_collate
    images: Tensor = collate(batch)[0].cpu()
    return images


def export(found: Found, to: str, out: Path, images: Tensor, trust: bool = False, overwrite: bool = False) -> float:
    """Write a student to `out` in a format of SUFFIXES; returns how far its logits are from the network's, at most.

    They are compared on `images` and on noise, in batches of different lengths, all by the file's own reader, while the
    file has a temporary name. Raises UserError, with nothing written, if they differ, or if `out` is there already.
    """
    if out.suffix != SUFFIXES[to]:
        raise UserError(f"{out}: --out must end in {SUFFIXES[to]} for --to {to}")
    if out.exists() and not overwrite:
        raise UserError(f"{out}: is there already; --overwrite replaces it, --out names another")
    about = found.description
    network = make(found, trust=trust)
    written = content(network, about, to)
    differences: list[float] = []

    def write(file: IO[bytes]) -> None:
        file.write(written)
        file.flush()
        differences.append(_difference(network, _reader(Path(file.name), to, found, trust), about, images, out))

    try:
        write_whole(out, write)
    except OSError as error:
        raise UserError(f"{out}: --out must name a file that can be written ({error.strerror or error})") from None
    return differences[0]


def _reader(path: Path, to: str, found: Found, trust: bool) -> Run:
    """Return what runs a file of a format that has a temporary name."""
    if to == "safetensors":
        network = make(found, trust=trust)
        fit_weights(network, safetensors.torch.load_file(path), path, "export", found.description.architecture)
        return network
    return onnx_of(path) if to == "onnx" else program_of(path)


def _difference(network: nn.Module, run: Run, about: Description, images: Tensor, out: Path) -> float:
    noise = torch.randn(3, 3, about.size, about.size, generator=torch.Generator().manual_seed(0))
    worst = 0.0
    with torch.no_grad():
        for batch in (noise, noise[:1], images):
            wanted, given = network(batch), run(batch)
            if given.shape != wanted.shape or not bool(torch.isfinite(given).all()):
                raise UserError(
                    f"{out}: was not written, because the file gives logits of the shape {tuple(given.shape)} or no "
                    f"finite numbers; the network gives {tuple(wanted.shape)}"
                )
            difference = (given - wanted).abs().max().item()
            if difference > TOLERANCE * max(1.0, wanted.abs().max().item()):
                raise UserError(
                    f"{out}: was not written, because its logits differ from the network's by {difference:.2g}; "
                    f"they must agree to {TOLERANCE:g}"
                )
            worst = max(worst, difference)
    return worst
