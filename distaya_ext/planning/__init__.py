"""What a run will take and give before it is started: memory, disk, bytes, time, and its doubts."""

from .plan import Plan, plan

__all__ = ["Plan", "plan"]
