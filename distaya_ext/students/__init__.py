"""Students: smaller models to teach, cut out of the teacher or found elsewhere, and compared."""

from .make import Made, make_student

__all__ = ["Made", "make_student"]
