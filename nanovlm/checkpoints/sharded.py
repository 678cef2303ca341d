"""Sharded tensors in a folder: each rank writes the rows it holds, and any number of ranks read them back.

    sharded/rank-00000.safetensors    the rows of rank 0; the header has, for every tensor, its first row here and its whole shape

FSDP2 shards a tensor along its first dimension: rank r of n holds ceil(rows / n) rows from row r · ceil(rows / n) on. A reader takes the rows
it needs out of all files, so the number of ranks may change. safetensors files hold numbers only; the .metadata of
torch.distributed.checkpoint is a pickle, which can run code when it is loaded.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from .. import UserError, distributed
from ..files import write_tensors

HEADER = "nanovlm.sharded"  # {name: [first row, *whole shape]} as JSON, in a file's header


class Piece(NamedTuple):
    """Consecutive rows of a tensor in one file; a scalar is one row."""

    first: int
    rows: int
    shape: tuple  # of the whole tensor
    dtype: torch.dtype
    file: safe_open


def write_shards(state, folder):
    """Write {name: tensor}, of which each rank holds some rows; call it on all ranks. Raises OSError on all ranks if one cannot write."""
    error = None
    try:
        write_local_rows(state, Path(folder))
    except OSError as failure:
        error = failure
    for failure in distributed.all_gather_object(error):
        if failure is not None:
            raise failure


def write_local_rows(state, folder):
    """Write this rank's rows. Of rows that several ranks hold (HSDP, counters), the first of these ranks writes them."""
    tensors, header = {}, {}
    for name, tensor in state.items():
        rows, first, is_writer = distributed.local_rows(tensor.detach())
        if is_writer and rows.numel():
            tensors[name] = rows.cpu().contiguous()
            header[name] = [first, *tensor.shape]
    folder.mkdir(exist_ok=True)
    write_tensors(
        tensors, folder / f"rank-{distributed.get_rank():05d}.safetensors", {HEADER: json.dumps(header)}
    )


def read_shards(state, folder):
    """Fill {name: tensor, of which this rank may hold some rows} from what any number of ranks wrote. Each rank reads alone.

    Raises UserError if a file is broken, if rows are missing, or if a shape or dtype differs.
    """
    pieces = read_pieces(folder)
    for name, tensor in state.items():
        rows, first, _ = distributed.local_rows(tensor.detach())
        if name not in pieces:
            raise UserError(f"{folder} does not hold {name}")
        for piece in pieces[name]:
            if piece.shape != tuple(tensor.shape) or piece.dtype != tensor.dtype:
                raise UserError(
                    f"{folder}: {name} is {list(piece.shape)} {piece.dtype}, the model has {list(tensor.shape)} {tensor.dtype}"
                )
            copy_rows(piece, name, rows, first)


def copy_rows(piece, name, rows, first):
    """Copy into `rows`, which begin at row `first` of the tensor, the rows that the piece holds of them."""
    if rows.dim() == 0:
        rows.copy_(piece.file.get_tensor(name))
        return
    start, end = max(first, piece.first), min(first + len(rows), piece.first + piece.rows)
    if start < end:
        rows[start - first : end - first] = piece.file.get_slice(name)[
            start - piece.first : end - piece.first
        ]


def read_pieces(folder):
    """{name: its Pieces by first row}, which together are the whole tensor. The numbers stay in the files."""
    if (folder / ".metadata").is_file():
        raise UserError(
            f"{folder} was written by an older nanovlm: its .metadata is a pickle, which can run code, and is not read. "
            "Use the last step of that run, which has a model.safetensors"
        )
    pieces = {}
    for path in sorted(folder.glob("rank-*.safetensors")):
        for name, piece in read_file_pieces(path):
            pieces.setdefault(name, []).append(piece)
    if not pieces:
        raise UserError(f"{folder} holds no rank-*.safetensors")
    for name, found in pieces.items():
        found.sort(key=lambda piece: piece.first)
        check_complete(name, found, folder)
    return pieces


def read_file_pieces(path):
    """(name, Piece) of every tensor in a file."""
    try:
        file = safe_open(path, framework="pt")
        header = json.loads((file.metadata() or {})[HEADER])
        for name in file.keys():  # noqa: SIM118 (no dict)
            first, *shape = header[name]
            part = file.get_slice(name)
            here, dtype = part.get_shape(), part[:1].dtype if shape else file.get_tensor(name).dtype
            if here[1:] != shape[1:]:
                raise ValueError(f"{name} is {here} here, of {shape}")
            yield name, Piece(int(first), here[0] if here else 1, tuple(shape), dtype, file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is broken, cut short or not ours: {type(error).__name__} {error}"
        ) from None


def check_complete(name, pieces, folder):
    """Raise UserError unless the pieces are all rows of one tensor, each row once."""
    shapes, row = {piece.shape for piece in pieces}, 0
    for piece in pieces:
        if piece.first != row:
            raise UserError(
                f"{folder}: rows {min(row, piece.first)} to {max(row, piece.first) - 1} of {name} are "
                f"{'missing' if piece.first > row else 'there twice'}"
            )
        row += piece.rows
    whole = pieces[0].shape[0] if pieces[0].shape else 1
    if len(shapes) > 1 or row != whole:
        raise UserError(
            f"{folder}: {row} rows of {name} are there, of shape {' and '.join(str(list(shape)) for shape in sorted(shapes))}"
        )
