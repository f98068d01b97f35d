"""The kinds of tables, by name: classification, torchvision's detectors, mdistiller's detectors on detectron2."""

from .classification import Classification
from .detection import Detection
from .detectron2 import Detectron2
from .kind import Kind

KINDS: dict[str, Kind] = {kind.name: kind for kind in (Classification(), Detection(), Detectron2())}
