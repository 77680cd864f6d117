"""Students: smaller models to teach, cut out of the teacher or found elsewhere, and compared."""

from .choose import Advice
from .make import Made, make_student
from .table import Row, Table, students

__all__ = ["Advice", "Made", "Row", "Table", "make_student", "students"]
