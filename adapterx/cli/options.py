"""Options that several commands share, each with one spelling, one meaning and one help text."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON; an error is JSON too.")]
Exported: TypeAlias = Annotated[
    Path | None,
    typer.Option("--adapter", help="The adapter that was exported with the model, for one that lost its names."),
]
Structural: TypeAlias = Annotated[
    bool, typer.Option("--structural", help="Take low-rank branches by structure, even when nothing names them.")
]
OtherBase: TypeAlias = Annotated[
    bool, typer.Option("--allow-other-base", help="Take an adapter although it says it was made for another base.")
]
Feeds: TypeAlias = Annotated[
    Path | None, typer.Option("--feeds", help="Inputs by name in an .npz file; else made from the graph.")
]


class AdapterDtype(enum.StrEnum):
    """Element types of ports."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"


OfPorts: TypeAlias = Annotated[
    AdapterDtype | None,
    typer.Option("--adapter-dtype", help="Of ports at linear layers, in place of that of the activations."),
]
Seed: TypeAlias = Annotated[int, typer.Option("--seed", min=0, help="Of everything random.")]
PackInputs: TypeAlias = Annotated[
    bool, typer.Option("--pack-inputs", help="One input per module type and side; needs --make-inputs.")
]
DynamicRank: TypeAlias = Annotated[
    bool, typer.Option("--dynamic-rank/--fixed-rank", help="Inputs take any rank, or a fixed one.")
]
OptionalInputs: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--optional-inputs/--required-inputs", help="Inputs that are not fed leave the base, or are an error."
    ),
]
MakeInputs: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--make-inputs/--external",
        help="Adapter weights become graph inputs, or initializers in a file that is given to each session.",
    ),
]
