"""What the plugin sees of a host: mdistiller, a fork of it, or the built-in one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from .. import config, data
from ..distillers import DISTILLERS
from ..distillers.features import FEATURES, PROBED, THEIRS
from ..distributed import process_group
from ..errors import UserError, shown
from ..teacher_logits.tables import count_views
from ..terminal import nearest
from .libraries import FORMS, find

MDISTILLERS_OWN = {
    "DISTILLER.TYPE": ["AT", "FITNET", *THEIRS],
    "SOLVER.TRAINER": ["crd", "dot", "crd_dot"],
}
"""What only mdistiller has, so that a config that asks for it elsewhere can be told so."""


@dataclass(frozen=True)
class Host:
    """The registries of one host, each the very dictionary that the host itself reads."""

    name: str
    distillers: dict[str, Any]
    """name -> class(student, teacher, cfg); NONE takes the student alone, CRD also the number of images."""
    trainers: dict[str, Any]
    """name -> class(experiment name, distiller, train loader, test loader, cfg)."""
    cifar_models: dict[str, Any]
    tiny_imagenet_models: dict[str, Any]
    """name -> (constructor(num_classes=), teacher's checkpoint or None), as cifar_models."""
    imagenet_models: dict[str, Any]
    """name -> constructor(pretrained=)."""
    cfg: CfgNode
    root: Path | None = None
    """The host's checkout; None for the built-in one."""

    def models(self, dataset: Any) -> dict[str, Any]:
        """Return the dictionary of networks for a data set, as data.source takes it; UserError for an unknown one."""
        return self.zoo(data.source(dataset).zoo)

    def zoo(self, name: str) -> dict[str, Any]:
        """Return the dictionary of networks that data.sources.ZOOS calls so."""
        zoos = {
            "cifar": self.cifar_models,
            "tiny_imagenet": self.tiny_imagenet_models,
            "imagenet": self.imagenet_models,
        }
        return zoos[name]

    def check_network(self, dataset: Any, name: str, where: str) -> None:
        """Raise UserError, which begins with `where`, if a name is no network for a data set.

        dataset: as data.source takes it.
        """
        source, models = data.source(dataset), self.models(dataset)
        if name not in models and find(name, where) is None:
            kind = dataset if isinstance(dataset, str) else dataset.DATASET.TYPE
            size = f" and INPUT.SIZE {source.side}" if isinstance(source, data.OwnImages) else ""
            raise UserError(
                f"{where} is {shown(name)}; it must be one of {', '.join(models)} for the data set {kind}{size}, or "
                f"{FORMS}{nearest(name, models)}"
            )

    def distiller(self, cfg: CfgNode) -> Any:
        """Return the class of DISTILLER.TYPE; the plugin's own if mdistiller's cannot do what is asked."""
        name = cfg.DISTILLER.TYPE
        # mdistiller's KD and DKD modify no terms, take no logits nor soft labels, fold nothing and do not say that a
        # batch may be divided; its DKD divides by the warm-up
        node = cfg.DISTILLER
        ours = node.TEACHER_LOGITS != "compute" or node.FOLD_TEACHER is True or config.softens(cfg)
        ours = ours or bool(node.MORE_TEACHERS)
        ours = ours or (name in ("KD", "DKD") and (process_group.size() > 1 or cfg.SOLVER.ACCUMULATE > 1))
        ours = config.modified(cfg) or (ours and name != "NONE")
        if ours or (name == "DKD" and not cfg.DKD.WARMUP):
            return DISTILLERS[name]
        return self.distillers[name]

    def check(self, cfg: CfgNode, origin: dict[str, str]) -> None:
        """Raise UserError if the config is out of range or names what this host does not have."""
        for path, names in (("DISTILLER.TYPE", self.distillers), ("SOLVER.TRAINER", self.trainers)):
            value, where = config.get(cfg, path), ""
            if value in names:
                continue
            if value in MDISTILLERS_OWN[path] and self.root is None:
                where = f"; {value} is mdistiller's, which is not here: install it or set MDISTILLER_ROOT"
            raise config.wrong(origin, path, value, f"one of {', '.join(names)}{where}")
        config.check(cfg, origin)
        self.check_feature(cfg, origin)
        for path in ("DISTILLER.STUDENT", "DISTILLER.TEACHER")[: 1 if cfg.DISTILLER.TYPE == "NONE" else 2]:
            for number, one in enumerate(config.by_teacher(cfg) if path.endswith("TEACHER") else [cfg]):
                where = origin.get("DISTILLER.MORE_TEACHERS" if number else path, "default")
                with config.naming(number):
                    self.check_network(cfg, config.get(one, path), f"{where}: {path}")
        settle_input(cfg, origin)
        config.check_mask(cfg, origin, data.num_classes(cfg))
        config.check_kept(cfg, origin, data.num_classes(cfg))
        if cfg.DISTILLER.TEACHER_LOGITS == "table":
            count_views(cfg)

    def check_feature(self, cfg: CfgNode, origin: dict[str, str]) -> None:
        """Raise UserError if a loss on features is mdistiller's and that is not here, or of images of another size."""
        name = config.feature(cfg)
        if name in THEIRS and (self.root is None or name not in FEATURES):
            allowed = (
                f"none, AT or FITNET; {name} is mdistiller's, which is not here: install it or set MDISTILLER_ROOT"
            )
            raise config.wrong(origin, "DeepKD.FEATURE", name, allowed)
        side = data.source(cfg).side
        if name in PROBED and tuple(cfg[name].INPUT_SIZE) != (side, side):
            allowed = f"[{side}, {side}], the size of the images, with DeepKD.FEATURE {name}"
            raise config.wrong(origin, f"{name}.INPUT_SIZE", cfg[name].INPUT_SIZE, allowed)


def settle_input(cfg: CfgNode, origin: dict[str, str]) -> None:
    """Give the images of a user's own data set the normalisation of the teacher, or of a student without one.

    A network of a library has the library's; another has ImageNet's, and so has a config that is frozen. Raises
    UserError for a key that says what images become, with a data set that says so itself.
    """
    if not isinstance(data.source(cfg), data.OwnImages):
        for key in config.all_keys():
            value = config.get(cfg, key.path)
            if key.path.startswith(data.OWN) and value != key.default:
                allowed = f"{key.default!r} with DATASET.TYPE {cfg.DATASET.TYPE}, which says itself what its images are"
                raise config.wrong(origin, key.path, value, allowed)
        return
    if cfg.is_frozen():
        return
    outside = find(cfg.DISTILLER.STUDENT if cfg.DISTILLER.TYPE == "NONE" else cfg.DISTILLER.TEACHER)
    own = (outside and outside.input()) or data.source(cfg)
    cfg.INPUT.MEAN = cfg.INPUT.MEAN or list(own.mean)
    cfg.INPUT.STD = cfg.INPUT.STD or list(own.std)
