"""The report's sentences: what was run, which runs do not count and why, how to read the numbers."""

from collections import Counter
from collections.abc import Sequence

from ..measures import CLASSIFICATION, MEASURES
from ..shared import count, duration
from ..table import Pair
from .cells import Cell, comparisons, number_name
from .collect import NOT_STARTED, UNFINISHED, Results
from .formats import CONFIDENCE, ranges
from .published import context, without_pair
from .statistics import LEVEL, MIN_RUNS


def what_was_run(table: Results) -> str:
    """Tell of a table's runs in one paragraph."""
    records = table.records
    pairs, methods, seeds = len(table.pairs), len(table.methods), len(table.seeds)
    text = (
        f"{count(methods, 'method')}, {count(pairs, 'teacher–student pair')} and {count(seeds, 'seed')} on "
        f"{table.dataset}, measured as {table.metric}: {count(len(table.runs), 'run')} planned, "
        f"{len(records)} counted"
    )
    kinds = Counter(left.kind for left in table.left_out)
    waiting = {NOT_STARTED: "not started", UNFINISHED: "unfinished"}
    said = [f"{kinds[kind]} {name}" for kind, name in waiting.items() if kinds[kind]]
    others = sum(count for kind, count in kinds.items() if kind not in waiting)
    said += [f"{others} left out"] if others else []
    text += f", {', '.join(said)}. " if said else ". "
    if records:
        spent = duration(60 * sum(record.minutes for record in records))
        first = min(record.started for record in records)
        text += f"The counted runs trained for {spent} in all, the first started {first}. "
    if taken := sum(record.taken_from is not None for record in records):
        text += f"Of them {taken} {'was' if taken == 1 else 'were'} trained for another table, under the same config. "
    if table.options:
        given = ", ".join(f"{key} {value or repr(value)}" for key, value in table.options.items())
        text += f"Every run was given the options {given}. "
    return (
        f"{text}All go through this package's launcher, under the protocol that stands over each table. "
        f"The main tables have the {number_name('last', table.measures)}."
    )


def published_without_pair(table: Results) -> list[str]:
    """List what is published for no pair in particular: a sentence that says so, then the values; empty without any."""
    values = without_pair(table.dataset, table.metric)
    return ["Published for a pair that is not named, so beside no cell of ours:", *values] if values else []


def others(table: Results, pair: Pair) -> list[str]:
    """List other people's published numbers for a pair: a sentence that says so, then the values; empty without any."""
    values = context(table.dataset, table.metric, pair.teacher, pair.student)
    return ["Other methods' published top-1 for this pair, under protocols of their own:", *values] if values else []


def left_out(table: Results) -> list[tuple[str, str, str, str]]:
    """List the runs that do not count: pair, method, seeds, why. Seeds of a cell with one reason share a row."""
    pairs = {pair.name: pair.label for pair in table.pairs}
    methods = {method.name: method.label for method in table.methods}
    rows: dict[tuple[str, str, str], list[int]] = {}
    for left in table.left_out:
        rows.setdefault((pairs[left.run.pair], methods[left.run.method], left.reason), []).append(left.run.seed)
    return [(pair, method, ranges(seeds), reason) for (pair, method, reason), seeds in rows.items()]


def notes(cells: Sequence[Cell]) -> list[str]:
    """Say how the numbers were made and what they do not say."""
    measures = cells[0].measures if cells else MEASURES[CLASSIFICATION]
    noun, step = measures.noun, measures.step
    said = [
        f"Last {step}: the {noun} at the end of training. Best {step}: the highest of all {step}s, chosen "
        "on the test images, so it flatters. It is shown because papers often print it.",
        "First: the row with the highest mean. Its test against the next knows nothing of their having been picked "
        "among all rows, so it says too often that the first is higher.",
        "Mean ± sample standard deviation (n − 1) over the seeds that count; differences are in percentage points.",
        "Gain: our mean minus the base method's in this table, each under its protocol above, with the "
        f"{CONFIDENCE} interval and the p value of Welch's t-test, which treats all runs as independent. "
        f"Higher and lower: p is below {1 - LEVEL:.2f}.",
        f"Paired: the {CONFIDENCE} t interval of the differences seed by seed, if both rows have the same seeds. It "
        "holds however far two runs of one seed go together, and the further they do, the narrower it is beside "
        "Welch's. The verdicts do not look at it.",
        f"A cell with fewer than {MIN_RUNS} runs, or against a base with fewer, gets no interval, no p value and "
        "no verdict.",
    ]
    last, best = comparisons(cells, "last"), comparisons(cells, "best")
    if last:
        holm = (
            f"Holm's p is adjusted over the {count(last, 'comparison')} with a base in this table that have a "
            f"p value ({best} for the best {step}): read by it, the chance that any of them is called higher or "
            f"lower by mistake stays below {100 * (1 - LEVEL):g} %."
        )
        said.insert(4, holm)
    if any(cell.published is not None for cell in cells):
        said.append(
            "Published numbers stand with their source and how sure they are; 'inferred' ones were worked out from "
            "a stated gain and nobody printed them, and 'hearsay' is compared with nothing. How many runs they come "
            f"from, how far those spread and whether they are of the last or the best {step} is not known here. So a "
            f"difference from them has only the {CONFIDENCE} t interval of our mean, and no test."
        )
    if measures.further:
        others = " and ".join(measures.further)
        said.append(
            f"{noun}: COCO's, the mean over overlaps of 0.50 to 0.95 and over the classes. {others}: at one overlap, "
            f"of the same {step}; gains and tests are of {noun}."
        )
    said.append("report.csv has every number of this page unrounded, runs.csv every run.")
    return said
