"""Options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="Local Hugging Face folder or hub id owner/name.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask the hub; use its local cache.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16 to run the model in.")]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="Packed weights: full-precision activations on the CPU too, slower; 8-bit without it.",
    ),
]
StrictKernels = Annotated[
    bool, typer.Option("--strict", help="Exit 4 where packed modules run on a slow kernel.")
]
Texts = Annotated[
    Path,
    typer.Option(help="Folder of <lang>.txt, <lang>.jsonl or <lang>.parquet.", show_default=False),
]

# of recipes; without one the recipe's own value, or its default, holds
CalibTokens = Annotated[
    int | None, typer.Option("--tokens", help="Calibration tokens over all languages.")
]
CalibWindow = Annotated[int | None, typer.Option("--window", help="Tokens per calibration window.")]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the choice of windows, and of the swaps of a search.")
]
EmbedBits = Annotated[
    int | None, typer.Option(help="8: embedding and head as int8, one scale per row.")
]
Parts = Annotated[
    int | None,
    typer.Option(help="Parts the statistics are summed in; without it one for each process."),
]
SpillDir = Annotated[
    Path | None, typer.Option(help="Folder of this machine for activations; beside OUT without it.")
]
MaxVram = Annotated[str | None, typer.Option(help="GPU memory to stay within, such as 16GiB.")]
MaxRam = Annotated[str | None, typer.Option(help="Memory to stay within, such as 8GiB.")]
