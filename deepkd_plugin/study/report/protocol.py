"""The protocol under which the numbers of a pair were made, read from its runs' records and configs."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ...config.tree import nest
from ...device import precision
from ...distillers import DISTILLERS
from ..measures import DETECTRON2
from .cells import Cell
from .collect import Record
from .detectron2 import WITHOUT_KEY
from .formats import ranges

ALIKE = ("Training images", "Test images", "Images", "Teacher", "Processes", "Versions", "Code")
"""What must be the same in all cells of a pair; methods may differ in the rest by their recipes."""

AS_BASE = ("Learning rate", "Batch", "Precision", "Iterations", "Epochs", "Evaluations", "Loss weights")
"""What a gain over a base takes for equal: if it is not, the gain is not the method's alone."""

MOST_ANSWERS = 4
"""How many different answers are told with the methods that give them; an ablation's rows name theirs anyway."""


def protocol(cells: Sequence[Cell]) -> list[tuple[str, list[str]]]:
    """Tell under which protocol the cells of one pair were made: (what, answers), naming the methods that differ.

    What only a run's record tells is left out as long as there is none.
    """
    told = [
        ("Seeds planned", _by_method(cells, lambda cell: [ranges(run.seed for run in cell.planned)])),
        (_length(cells[0]), _by_method(cells, lambda cell: [run.epochs for run in cell.planned])),
    ]
    told += [(what, _by_method(cells, _of_records(get))) for what, get in _PROTOCOL]
    return [(what, answers) for what, answers in told if answers]


def cautions(cells: Sequence[Cell]) -> list[str]:
    """Say which cells of one pair cannot simply be compared, because they were not made alike."""
    records = [record for cell in cells for record in cell.records]
    said = [
        f"{what} differ: {'; '.join(_by_method(cells, _of_records(get)))}"
        for what, get in _PROTOCOL
        if what in ALIKE and len({get(record) for record in records} - {None, ""}) > 1
    ]
    by_name = {cell.method.name: cell for cell in cells}
    for cell in cells:
        base = by_name.get(cell.base.name) if cell.base else None
        if base is None or not (cell.records and base.records):
            continue
        for what, get in (*_PROTOCOL, ("Loss weights", _weights), (_length(cell), lambda record: record.epochs)):
            mine, theirs = (_joined(map(get, one.records)) for one in (cell, base))
            if what in AS_BASE and mine != theirs:
                verb = "are" if what.endswith("s") else "is"
                said.append(f"{what} of {cell.method.label} {verb} {mine}, of its base {theirs}")
    return said


def _length(cell: Cell) -> str:
    """Name what the length of a run is counted in, as an entry of the protocol."""
    return f"{cell.measures.step.capitalize()}s"


def _of_records(get: Callable[[Record], Any]) -> Callable[[Cell], list[Any]]:
    return lambda cell: [get(record) for record in cell.records]


def _joined(answers: Iterable[Any]) -> str:
    """Join answers, once each."""
    return " and ".join(dict.fromkeys(map(str, answers)))


def _by_method(cells: Sequence[Cell], get: Callable[[Cell], list[Any]]) -> list[str]:
    """Collect what cells say, the commonest answer first; an answer of the minority names its methods."""
    said: dict[str, list[str]] = {}
    for cell in cells:
        if text := _joined(answer for answer in get(cell) if answer not in (None, "")):
            said.setdefault(text, []).append(cell.method.label)
    ordered = sorted(said.items(), key=lambda item: -len(item[1]))
    total = sum(len(labels) for labels in said.values())
    if len(said) > MOST_ANSWERS:
        first, *others = said
        return [f"by row: {first}", *others]
    return [text if 2 * len(labels) > total else f"{text} ({_listed(labels)})" for text, labels in ordered]


def _listed(labels: Sequence[str]) -> str:
    """Join labels; one with a comma of its own is quoted."""
    return ", ".join(f"“{label}”" if "," in label else label for label in labels)


def _setting(form: Callable[[dict[str, Any]], str | None]) -> Callable[[Record], str | None]:
    """Read a value of a run's config; None if the config lacks a key or holds something else there."""

    def get(record: Record) -> str | None:
        try:
            return form(record.settings)
        except (KeyError, TypeError, ValueError):
            return None

    return get


def _rate(record: Record) -> str | None:
    settings = record.settings
    if "SOLVER.BASE_LR" in settings:  # on detectron2, where few of its values are written down
        steps = " and ".join(f"{step:,}" for step in settings["SOLVER.STEPS"])
        return f"{settings['SOLVER.BASE_LR']:g}, times {settings['SOLVER.GAMMA']:g} after {steps} iterations"
    rates = list(record.lr.values())
    schedule = settings.get("SOLVER.LR_SCHEDULE", "")
    return f"{max(rates):g} to {rates[-1]:g} {schedule}".strip() if rates else None


def _momenta(record: Record) -> str | None:
    last = next(reversed(record.momentum.values()), {})
    momenta = {stream: f"{value:g}" for stream, value in last.items()}
    if len(set(momenta.values())) < 2:
        return next(iter(momenta.values()), None)
    return ", ".join(f"{stream.upper()} {value}" for stream, value in momenta.items())


def _variant(settings: dict[str, Any]) -> str | None:
    deltas = [v for k, v in settings.items() if k.startswith("SOLVER.DECOUPLED.DELTA.")]
    return settings["SOLVER.DECOUPLED.VARIANT"] if any(deltas) else None


def _mask(settings: dict[str, Any]) -> str | None:
    if not str(settings.get("DISTILLER.TYPE")).endswith("DeepKD"):
        return None
    kind = settings["DeepKD.MASK.TYPE"]
    if kind == "none":
        return "none"
    names = ("K",) if kind == "static" else ("INITIAL", "OPTIMAL")
    size = " to ".join(f"{settings[f'DeepKD.MASK.{name}']:g}" for name in names)
    phases = " and ".join(f"{phase:.3g}" for phase in settings["DeepKD.MASK.PHASES"])
    ends = "" if kind == "static" else f", phases end at {phases}"
    return f"{kind}, K {size}{ends}, {settings['DeepKD.MASK.READING']}"


def _training(settings: dict[str, Any]) -> str:
    per_class = settings["DATASET.TRAIN_PER_CLASS"]
    return f"the first {per_class} of each class" if per_class else "all"


def _testing(settings: dict[str, Any]) -> str:
    share = settings["DATASET.HOLDOUT"]
    return f"{100 * share:g} % of the training images, held out" if share else "the data set's own"


def _sets(settings: dict[str, Any]) -> str:
    """Name the data sets of a run on detectron2."""
    train, test = (", ".join(settings[f"DATASETS.{part}"]) for part in ("TRAIN", "TEST"))
    return f"{train} to train on, {test} to test on"


def _proposals(settings: dict[str, Any]) -> str:
    names = ("DETECTION.PROPOSALS", "DETECTION.FOREGROUND")
    if names[0] not in settings:
        names = ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "MODEL.ROI_HEADS.POSITIVE_FRACTION")
    count, share = (settings[name] for name in names)
    return f"{count} an image, at most {100 * share:g} % of them foreground"


def _teacher(record: Record) -> str | None:
    if record.teacher is None:
        return None
    weights = f"weights {record.teacher}"
    if record.teacher_acc is None:
        return weights
    noun = "" if record.measures.noun == "accuracy" else f"{record.measures.noun} "
    return f"{noun}{record.teacher_acc:.2f} % on the test images ({weights})"


def _batch(settings: dict[str, Any]) -> str:
    parts = settings.get("SOLVER.ACCUMULATE", 1)
    return f"{settings['SOLVER.BATCH_SIZE']} images" + (f" in {parts} micro-batches" if parts > 1 else "")


def _precision(settings: dict[str, Any]) -> str:
    amp = settings["SOLVER.AMP"]
    return f"{precision(amp)} autocast" if amp else "float32"


def _weights(record: Record) -> str:
    """List what a run's method weighs its losses by, such that two methods with equal losses have equal lists."""
    settings = (WITHOUT_KEY if record.run.kind == DETECTRON2 else {}) | record.settings
    ask = getattr(DISTILLERS.get(str(settings.get("DISTILLER.TYPE"))), "loss_weights", None)
    try:
        weights = ask(nest(settings)) if ask else {}
    except (AttributeError, KeyError, TypeError, ValueError):  # a config of other keys
        weights = {}
    return ", ".join(f"{name} {weight:g}" for name, weight in weights.items()) or "not known"


_PROTOCOL: tuple[tuple[str, Callable[[Record], str | None]], ...] = (
    ("Learning rate", _rate),
    ("Batch", _setting(_batch)),
    ("Precision", _setting(_precision)),
    ("Iterations", _setting(lambda settings: f"{settings['SOLVER.MAX_ITER']:,}")),
    ("Training images", _setting(_training)),
    ("Test images", _setting(_testing)),
    ("Images", _setting(_sets)),
    ("Proposals", _setting(_proposals)),
    ("Teacher", _teacher),
    ("Momentum variant", _setting(_variant)),
    ("Momenta, last epoch", _momenta),
    ("Mask", _setting(_mask)),
    ("Execution", lambda record: " and ".join(record.execution)),
    ("Processes", lambda record: ", then ".join(map(str, record.processes))),
    ("Versions", lambda record: ", ".join(map(" ".join, (("python", record.python), *record.versions.items())))),
    ("Hardware", lambda record: f"{record.device}; {record.processor}"),
    ("Commit", lambda record: record.commit),
    ("Code", lambda record: record.codes[0]),
)
