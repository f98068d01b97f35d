"""DeepKD in Transformers' Trainer: a small BERT learns from a larger one which topic a sentence has."""

import tempfile

import torch
import torch.nn.functional as F
from made_text import TOPICS, VOCABULARY, optimizer, outputs, rows, sentences, taught
from transformers import BertConfig, BertForSequenceClassification
from transformers_trainer import Distiller, train

from deepkd_plugin import TopKSchedule, decoupled_kd

SCHEDULE = TopKSchedule(len(TOPICS), initial=1, optimal=2)  # non-target classes that count


class TextDistiller(Distiller):
    """DeepKD over KD, with weights 0.5, 1 and 1."""

    def by_stream(self, logits, teacher_logits, labels, items):
        """Average over a micro-batch; backward adds up those of a step."""
        top_k = SCHEDULE(min(self.state.epoch / self.args.num_train_epochs, 1.0))
        tckd, nckd, p = decoupled_kd(logits, teacher_logits, labels, temperature=2.0, top_k=top_k)
        losses = {"tog": 0.5 * F.cross_entropy(logits, labels), "tcg": tckd.mean(), "ncg": ((1 - p) * nckd).mean()}
        return {name: loss / self.current_gradient_accumulation_steps for name, loss in losses.items()}


def bert(width, layers):
    """Make a BERT with random weights, without dropout, so that runs can be compared."""
    torch.manual_seed(width)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 2, "num_labels": len(TOPICS), "vocab_size": len(VOCABULARY)}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(max_position_embeddings=32, **sizes, **dropout))


def accuracy(network, dataset):
    """Return the share of sentences whose topic is right."""
    labels = torch.stack([row["labels"] for row in dataset])
    return (outputs(network, dataset)[1].argmax(1) == labels).double().mean().item()


def main():
    """Train the teacher and the student; return their accuracy on other sentences."""
    seen, new = (rows(sentences(256, seed), label_of_topic=True) for seed in (0, 1))
    with tempfile.TemporaryDirectory() as folder:
        teacher, student = taught(bert(32, 2), seen, folder), bert(16, 2)
    train(student, teacher, seen, TextDistiller, optimizer, logging_strategy="epoch")
    return accuracy(teacher, new), accuracy(student, new)


if __name__ == "__main__":
    print("teacher {:.0%}, student {:.0%} of new sentences".format(*main()))
