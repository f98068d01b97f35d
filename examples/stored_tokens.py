"""causal_lm.py with the teacher's top-K logits of every token stored before, so that no teacher runs in training."""

import hashlib
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from causal_lm import TEMPERATURE, TOKENS, TokenDistiller, of_next, qwen
from made_text import LONGEST, optimizer, outputs, rows, sentences, taught
from transformers_trainer import train

from deepkd_plugin.errors import UserError
from deepkd_plugin.run.checkpoint import fingerprint
from deepkd_plugin.teacher_logits.table import Key, Table

KEPT = 16  # logits of a token that are stored, the target's among them, and one for the others' mass


def store(teacher, dataset, folder, dtype="float16"):
    """Write a table with a record for each token, and return it. Its key says what the logits are of."""
    text = hashlib.sha256(b"".join(row["input_ids"].numpy().tobytes() for row in dataset)).hexdigest()
    of = ("qwen2", fingerprint(teacher), "made_text", text, len(dataset) * LONGEST, 1, "as it is", TOKENS, "float32")
    table = Table.make(Path(folder), Key(*of, dtype, seed=0, kept=KEPT, temperature=TEMPERATURE))
    logits = outputs(teacher, dataset)[1][..., :TOKENS].flatten(0, 1).numpy()  # a large set: in batches
    target = of_next(torch.stack([row["labels"] for row in dataset])).flatten()
    (places,) = (target != -100).numpy().nonzero()
    contents, held = table.key.form.pack(logits[places], target.numpy()[places])
    table.write(places[held], 0 * places[held], contents[held])
    return table


class Stored:
    """A table as a teacher: the logits of the rows that `index` names; 0 where nothing was stored."""

    def __init__(self, table):
        self.table = table

    def __call__(self, index, attention_mask, **inputs):
        places = (index[:, None] * LONGEST + torch.arange(LONGEST)).flatten().numpy()
        contents, there = self.table.read(places, 0 * places)
        if there.sum() != attention_mask[:, 1:].sum().item():  # the tokens that have a next one
            raise UserError(f"{self.table.path}: lacks tokens of these rows; store them again, or as float32")
        return SimpleNamespace(logits=torch.from_numpy(self.table.key.form.unpack(contents)).view(-1, LONGEST, TOKENS))


class StoredDistiller(TokenDistiller):
    """The distiller of causal_lm.py, under a mask of stored logits alone."""

    def top_k(self):
        """Return how many non-target tokens count now: more than are stored would be taken for equally likely."""
        return min(super().top_k(), KEPT - 1)


def main():
    """Store, forget the teacher, train a student; return its perplexity on other sentences."""
    seen, new = (rows(sentences(256, seed), label_of_topic=False) for seed in (0, 1))
    with tempfile.TemporaryDirectory() as folder:
        table = store(taught(qwen(32, 2, classes=48), seen, folder), seen, folder)
        student, options = qwen(16, 1, classes=40), {"remove_unused_columns": False}  # `index` among them
        train(student, Stored(table), seen, StoredDistiller, optimizer, **options)
    return torch.tensor(outputs(student, new)[0]).exp().item()


if __name__ == "__main__":
    print(f"perplexity on new sentences: {main():.2f}")
