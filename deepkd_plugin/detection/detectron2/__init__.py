"""DeepKD inside mdistiller's detection branch: its RCNNKD on detectron2, with losses and momenta by stream.

config.py has the keys and their checks, rcnn.py the meta architecture RCNNDeepKD, loader.py training images that a
resumed run continues with, trainer.py the step, the hooks and the evaluation, and launch.py what
detection/train_net.py runs after `deepkd apply`. merge.py makes the file that a run starts from. Except for this
module, launch.py and merge.py they cannot be imported without detectron2 and mdistiller's checkout; `require` says in
one line what is missing.
"""

import importlib
import sys
from operator import attrgetter
from pathlib import Path
from types import ModuleType

from ...errors import UserError
from ...hosts import mdistiller

SCRIPT = "detection/train_net.py"

_INSTALL = "pip install git+https://github.com/facebookresearch/detectron2"
_NEEDED = {
    "detectron2.engine": ("DefaultTrainer", "SimpleTrainer", "launch"),
    "detectron2.engine.train_loop": ("TrainerBase.after_backward",),
    "detectron2.solver.build": ("get_default_optimizer_params",),
    "detectron2.evaluation": ("COCOEvaluator",),
}
"""What we use of detectron2. The version does not help: the release of 2021 and today's main branch are both 0.6."""

_loaded: ModuleType | None = None


def require(root: Path | None = None) -> ModuleType:
    """Import mdistiller's package detection/model, which registers its backbones and RCNNKD in detectron2.

    root: mdistiller's checkout; by default what `locate` finds. Raises UserError if detectron2 or the checkout is
    missing or cannot be used.
    """
    global _loaded
    if _loaded is not None and root is None:
        return _loaded
    _require_detectron2()
    root = root or locate()
    folder = root / "detection" / "model"
    for path in (root, folder.parent):
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
    try:
        module = importlib.import_module("model")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("model", "mdistiller"):
            raise UserError(f"{folder}: has no module {error.name}; it must be mdistiller's own") from None
        raise UserError(
            f"{folder}: needs the package {error.name}, which is not installed; pip install {error.name}"
        ) from None
    except Exception as error:  # an old module on a new detectron2 can raise anything
        raise UserError(f"{folder}: cannot be imported ({type(error).__name__}: {error})") from None
    imported = Path(getattr(module, "__file__", None) or ".").resolve().parent
    if imported != folder.resolve():
        raise UserError(f"{folder}: another package named model is imported already, from {imported}; only one can be")
    _loaded = module
    return module


def locate() -> Path:
    """Find mdistiller's checkout. Raises UserError if there is none with a detection branch.

    In this order: the one whose detection/train_net.py is running, what hosts.mdistiller finds, the current folder,
    the folder above it.
    """
    script = Path(getattr(sys.modules.get("__main__"), "__file__", None) or ".").resolve()
    root = script.parent.parent
    if script == root / SCRIPT and _is_root(root):
        return root
    root = mdistiller.locate()
    if root is not None and _is_root(root):
        return root
    for folder in (Path.cwd(), Path.cwd().parent):
        if _is_root(folder):
            return folder
    if root is None:
        raise UserError(
            f"environment: {mdistiller.ENVIRONMENT} must name a checkout of mdistiller, whose detection/ this builds on"
        )
    raise UserError(f"{root}: has no detection/model/rcnn.py; a whole checkout of mdistiller is needed")


def _is_root(folder: Path) -> bool:
    return (folder / "detection/model/rcnn.py").is_file() and (folder / "mdistiller/distillers").is_dir()


def _require_detectron2() -> None:
    try:
        import detectron2
    except ModuleNotFoundError:
        raise UserError(f"detectron2 is not installed; {_INSTALL}") from None
    version = getattr(detectron2, "__version__", "unknown")
    for name, parts in _NEEDED.items():
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] == "detectron2":
                raise _too_old(version, error.name or name) from None
            raise UserError(
                f"detectron2: needs the package {error.name}, which is not installed; pip install {error.name}"
            ) from None
        except Exception as error:  # for example if it was compiled for another PyTorch
            raise UserError(
                f"detectron2: cannot be imported ({type(error).__name__}: {' '.join(str(error).split())}); "
                f"build it for the installed PyTorch: {_INSTALL}"
            ) from None
        for part in parts:
            try:
                attrgetter(part)(module)
            except AttributeError:
                raise _too_old(version, f"{name}.{part}") from None


def _too_old(version: str, missing: str) -> UserError:
    return UserError(
        f"detectron2: version {version} has no {missing}; its main branch of March 2023 or later is needed: {_INSTALL}"
    )
