"""DeepKD in Lightning: manual optimization, whose optimizer has the same `backward`."""

import lightning
import torch
from shared import EPOCHS, batches, data, losses, networks, optimizer, report


class Distillation(lightning.LightningModule):
    """A student with its teacher. Of the two only the student is trained."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.automatic_optimization = False

    def configure_optimizers(self):
        """Return the optimizer, which Lightning wraps."""
        return optimizer(self.student)

    def training_step(self, batch, index):
        """Take one step."""
        inputs, labels = batch
        opt = self.optimizers()
        opt.zero_grad()
        with torch.no_grad():
            teacher_logits = self.teacher(inputs)
        opt.backward(losses(self.student(inputs), teacher_logits, labels, self.current_epoch))
        # several processes: opt.average_gradients()
        opt.step()


def train(student, teacher, loader, **options):
    """Train the student in place. options: more of Trainer's."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=1, **(quiet | options))
    trainer.fit(Distillation(student, teacher), loader)


if __name__ == "__main__":
    student, teacher = networks()
    train(student, teacher, batches(data()))
    print(report(student, teacher, data()))
