"""Whether a teacher and a student fit together, told before either of them is loaded."""

from __future__ import annotations

from ..checkpoint import Checkpoint
from ..errors import UsageError
from ..models.skeleton import build_skeleton
from .hidden import Pairs, pairs, source_layers
from .spec import LossSpec


def weights(checkpoint: Checkpoint) -> int:
    """Weights of a model as its config describes it, whatever of them is packed or 0; a tied head
    counts once.
    """
    skeleton = build_skeleton(checkpoint.config, checkpoint.dtype)
    return sum(parameter.numel() for parameter in skeleton.parameters())


def check_sizes(teacher: Checkpoint, student: Checkpoint) -> None:
    """UsageError for a student that is the teacher or has more weights than it."""
    if teacher.folder.resolve() == student.folder.resolve():
        raise UsageError(
            f"the student {student.folder.name} is the teacher itself; nothing could be learnt"
        )
    ours, theirs = weights(student), weights(teacher)
    if ours > theirs:
        raise UsageError(
            f"the student has {ours} weights, more than the {theirs} of its teacher; it is the "
            "smaller model that learns, so exchange the two"
        )


def check_loss(loss: LossSpec) -> None:
    """UsageError for a cache that could not hold what the loss wants, or that it would not read."""
    if loss.cache is None:
        if loss.cache_bytes is not None:
            raise UsageError(
                "a size is given for a cache and no number of tokens to keep; say both or neither"
            )
        return
    hidden = [name for name in ("cosine", "mse") if getattr(loss, name)]
    if hidden:
        raise UsageError(
            f"a cache holds the teacher's {loss.cache} most probable tokens and no hidden states, "
            f"which {' and '.join(hidden)} compare; leave out the cache or set their weight to 0"
        )
    if not loss.kl:
        raise UsageError("a cache of the teacher serves kl alone, and the weight of kl is 0")


def state_pairs(loss: LossSpec, teacher: Checkpoint, student: Checkpoint) -> Pairs:
    """The hidden states that are compared; none where no loss looks at them. UsageError for layers
    that are not there.
    """
    if not loss.cosine + loss.mse:
        return []
    depth, deep = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    return pairs(loss.layers, depth, deep, kept_layers(teacher, student))


def kept_layers(teacher: Checkpoint, student: Checkpoint) -> tuple[int, ...] | None:
    """Layers of the teacher that are the student's, where it is the teacher without some."""
    depths = (each.config.num_hidden_layers for each in (student, teacher))
    return source_layers(student.folder, *depths)


def dropped_layers(teacher: Checkpoint, student: Checkpoint) -> list[int]:
    """Layers of the teacher that the student is without, where it is otherwise the teacher."""
    kept = kept_layers(teacher, student)
    every = range(teacher.config.num_hidden_layers)
    return [] if kept is None else [i for i in every if i not in kept]


def common_logits(teacher: Checkpoint, student: Checkpoint) -> int | None:
    """Logits both have, where one tokenizer serves embeddings that are padded differently; None
    where they have as many.
    """
    ours, theirs = student.config.vocab_size, teacher.config.vocab_size
    return None if ours == theirs else min(ours, theirs)
