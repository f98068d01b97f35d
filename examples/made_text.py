"""What the examples on text have in common: sentences that are made here, their tokens, the optimizer, the teachers."""

import random

import torch
from transformers import Trainer, TrainingArguments

from deepkd_plugin import DecoupledAdamW

TOPICS = {
    "animals": ["cat", "dog", "horse", "bird", "barks", "sleeps", "eats"],
    "kitchen": ["cook", "baker", "bread", "soup", "bakes", "stirs", "eats"],
    "weather": ["rain", "wind", "cloud", "storm", "falls", "blows", "sleeps"],
    "traffic": ["bus", "driver", "train", "bike", "stops", "drives", "falls"],
}
"""Four nouns and three verbs each; some verbs belong to two topics."""
FILLERS = ["the", "a", "old", "small", "quick", "and", "."]
WORDS = ["[PAD]", "[START]", *dict.fromkeys([word for topic in TOPICS.values() for word in topic] + FILLERS)]
VOCABULARY = {word: number for number, word in enumerate(WORDS)}
LONGEST = 16
"""Tokens of a row."""


def sentences(count, seed=0):
    """Make (topic, words): two or three clauses, in which one word of ten is of another topic."""
    chance, made = random.Random(seed), []
    for _ in range(count):
        topic, words = chance.choice(list(TOPICS)), ["[START]"]
        for number in range(chance.choice([2, 3])):
            noun, verb = (
                chance.choice(TOPICS[topic if chance.random() < 0.9 else chance.choice(list(TOPICS))][part])
                for part in (slice(4), slice(4, None))
            )
            words += ["and"] * (number > 0) + [chance.choice(["the", "a"])]
            words += [*chance.choice([[], ["old"], ["small"], ["quick"]]), noun, verb]
        made.append((topic, [*words, "."][:LONGEST]))
    return made


def rows(made, label_of_topic):
    """Make the rows of a batch, padded to one length. Labels: the topic's number, or every token but the padding."""
    result = []
    for index, (topic, words) in enumerate(made):
        empty = LONGEST - len(words)
        tokens = [VOCABULARY[word] for word in words]
        labels = list(TOPICS).index(topic) if label_of_topic else tokens + [-100] * empty
        row = {"input_ids": tokens + [0] * empty, "attention_mask": [1] * len(words) + [0] * empty}
        result.append({name: torch.tensor(value) for name, value in (row | {"labels": labels, "index": index}).items()})
    return result


def optimizer(student):
    """Make AdamW with a momentum for each stream: 0.9 ± 0.05."""
    return DecoupledAdamW(student.parameters(), 1e-2, {"tog": 0.95, "tcg": 0.85, "ncg": 0.95}, weight_decay=0.01)


def taught(teacher, dataset, folder, epochs=6):
    """Train a teacher as Trainer always does, and freeze it."""
    fixed = {"save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(folder, num_train_epochs=epochs, learning_rate=3e-3, **fixed)
    Trainer(model=teacher, args=arguments, train_dataset=dataset).train()
    return teacher.eval().requires_grad_(False)


@torch.no_grad()
def outputs(network, dataset):
    """Return what a network says of all rows: its mean loss, and its logits."""
    names = ("input_ids", "attention_mask", "labels")
    made = network.eval()(**{name: torch.stack([row[name] for row in dataset]) for name in names})
    return made.loss.item(), made.logits
