"""A frozen teacher's logits of every weak view of the training images, kept on disk: DISTILLER.TEACHER_LOGITS table.

`table` has the file, `lookup` what a step asks for, `tables` which table a config means and what is in a folder.
"""

from .lookup import SeveralTeachersLogits, TeacherLogits
from .tables import open_logits

__all__ = ["SeveralTeachersLogits", "TeacherLogits", "open_logits"]
