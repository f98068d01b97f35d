"""DeepKD in Transformers' Trainer: a small BERT learns from a larger one, both made from a config."""

import tempfile

import torch
from shared import BATCH, CLASSES, EPOCHS, losses, optimizer
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import deepkd_plugin


class Distiller(Trainer):
    """A Trainer whose step makes the gradients by stream."""

    def __init__(self, teacher, **options):
        super().__init__(**options)
        self.teacher = teacher

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Do what Trainer does, with `deepkd_plugin.backward` instead of accelerator.backward(loss)."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits
        inputs.pop("index", None)  # by which a stored teacher finds the samples
        by_stream = self.by_stream(model.train()(**inputs).logits, teacher_logits, labels, num_items_in_batch)
        deepkd_plugin.backward(self.optimizer, by_stream)
        return sum(by_stream.values()).detach()

    def by_stream(self, logits, teacher_logits, labels, items):
        """Average over a micro-batch; backward adds up those of a step."""
        share = 1 / self.current_gradient_accumulation_steps
        return {k: share * v for k, v in losses(logits, teacher_logits, labels, int(self.state.epoch)).items()}


def bert(width):
    """Make a BERT with random weights, without dropout, so that runs can be compared."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(width)
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=CLASSES, **sizes, **dropout))


def sentences():
    """Make 128 sentences of 6 words with labels."""
    words = torch.randint(50, (128, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row[0] % CLASSES} for row in words]


def train(student, teacher, dataset, distiller=Distiller, make_optimizer=optimizer, **options):
    """Train the student in place. options: more of TrainingArguments'."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = {"lr_scheduler_type": "constant", "save_strategy": "no", "report_to": [], "disable_tqdm": True}
        fixed |= {"num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, "use_cpu": True}
        arguments = TrainingArguments(folder, **(fixed | options))
        optimizers = (make_optimizer(student), None)
        distiller(teacher, model=student, args=arguments, train_dataset=dataset, optimizers=optimizers).train()


if __name__ == "__main__":
    train(bert(16), bert(32).eval().requires_grad_(False), sentences(), logging_strategy="epoch")
