"""One offline page and a model card, made from what the runs left in a folder."""

from .facts import Facts, check_stores, read, store
from .pages import REPORT, write_pages

__all__ = ["REPORT", "Facts", "check_stores", "read", "store", "write_pages"]
