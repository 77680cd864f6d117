"""Students: smaller models to teach, cut out of the teacher or found elsewhere, and compared."""

from .choose import Advice
from .compare import students
from .make import Made, make_student
from .rows import Row, Table

__all__ = ["Advice", "Made", "Row", "Table", "make_student", "students"]
