"""DeepKD on tokens in Transformers' Trainer: a small causal language model learns from a larger one."""

import tempfile

import torch
import torch.nn.functional as F
from made_text import VOCABULARY, optimizer, outputs, rows, sentences, taught
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers_trainer import Distiller, train

from deepkd_plugin import TopKSchedule, shared_vocabulary, token_kd

# both networks have more classes than there are tokens, and not the same number: 40 and 48
TOKENS = shared_vocabulary(VOCABULARY, VOCABULARY)  # with tokenizers: student's and teacher's get_vocab()
SCHEDULE = TopKSchedule(TOKENS)  # non-target tokens that count
TEMPERATURE = 2.0


def of_next(labels):
    """Shift labels (B, L), so that each stands at the logits that predict it; the last logits predict none."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


class TokenDistiller(Distiller):
    """DeepKD over KD, with weights 0.5, 1 and 1."""

    def by_stream(self, logits, teacher_logits, labels, items):
        """Average over all tokens of a step that have a label (`items`), in however many micro-batches they are."""
        target = of_next(labels)
        tckd, nckd, p = token_kd(logits, teacher_logits, target, TEMPERATURE, self.top_k(), vocabulary=TOKENS)
        task = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")  # ignores -100 too
        sums = {"tog": 0.5 * task, "tcg": tckd.sum(), "ncg": ((1 - p) * nckd).sum()}
        return {name: total / items for name, total in sums.items()}

    def top_k(self):
        """Return how many non-target tokens count now."""
        return SCHEDULE(min(self.state.epoch / self.args.num_train_epochs, 1.0))


def qwen(width, layers, classes):
    """Make a Qwen2 with random weights."""
    torch.manual_seed(width)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "vocab_size": classes}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, max_position_embeddings=32, pad_token_id=0))


def main():
    """Train the teacher and the student; return their perplexities on other sentences."""
    seen, new = (rows(sentences(256, seed), label_of_topic=False) for seed in (0, 1))
    with tempfile.TemporaryDirectory() as folder:
        teacher, student = taught(qwen(32, 2, classes=48), seen, folder), qwen(16, 1, classes=40)
    train(student, teacher, seen, TokenDistiller, optimizer, logging_strategy="epoch")
    return tuple(torch.tensor(outputs(network, new)[0]).exp().item() for network in (teacher, student))


if __name__ == "__main__":
    print("perplexity on new sentences: teacher {:.2f}, student {:.2f}".format(*main()))
