"""Several processes at one run, started by torchrun: torch.distributed, gloo on CPUs and NCCL on
GPUs.

team() is all that the rest of the package asks: who takes part, which share is this process's own,
and the few ways in which processes tell each other something. Without torchrun it is a team of one.
"""

from .folder import same_folder
from .jobs import jobs_of, least_loaded
from .join import joined, world_size
from .reading import read_shared
from .sums import Parts, PartSums, Sum
from .team import Team, team
from .together import by_all, by_first
from .watch import leave

__all__ = [
    "PartSums",
    "Parts",
    "Sum",
    "Team",
    "by_all",
    "by_first",
    "jobs_of",
    "joined",
    "least_loaded",
    "leave",
    "read_shared",
    "same_folder",
    "team",
    "world_size",
]
