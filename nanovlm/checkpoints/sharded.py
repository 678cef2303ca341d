"""Sharded tensors in a folder: each rank writes its own rows, and any number of ranks read them.

    sharded/rank-00000.safetensors   rows of rank 0. The header holds, for each tensor, the index of
                                     the first row in this file and the shape of the full tensor

FSDP2 shards a tensor along its first dimension: rank r of n holds ceil(rows / n) rows from row
r · ceil(rows / n) on. A rank reads the rows it needs from all files, so the number of ranks may
change. safetensors files hold numbers only. The .metadata of torch.distributed.checkpoint is a
pickle, which can run code when it is loaded.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from .. import UserError, distributed
from ..files import write_tensors

HEADER = "nanovlm.sharded"  # the key of {name: [first row, *full shape]} in a file's metadata


class Piece(NamedTuple):
    """Consecutive rows of a tensor in one file. A scalar is one row."""

    first: int
    rows: int
    shape: tuple  # of the full tensor
    dtype: torch.dtype
    file: safe_open


def write_shards(state, folder):
    """Write {name: tensor}, of which each rank holds some rows. Call it on all ranks.

    Raises OSError on all ranks if one rank cannot write.
    """
    error = None
    try:
        write_local_rows(state, Path(folder))
    except OSError as failure:
        error = failure
    for failure in distributed.all_gather_object(error):
        if failure is not None:
            raise failure


def write_local_rows(state, folder):
    """Write this rank's rows. Rows that several ranks hold (HSDP, step counts) are written once."""
    tensors, header = {}, {}
    for name, tensor in state.items():
        rows, first, is_writer = distributed.local_rows(tensor.detach())
        if is_writer and rows.numel():
            tensors[name] = rows.cpu().contiguous()
            header[name] = [first, *tensor.shape]
    folder.mkdir(exist_ok=True)
    path = folder / f"rank-{distributed.get_rank():05d}.safetensors"
    write_tensors(tensors, path, {HEADER: json.dumps(header)})


def read_shards(state, folder):
    """Copy saved rows into {name: tensor}; this rank may hold only some rows of a tensor.

    Ranks read independently. Raises UserError if a file is broken, if rows are missing, or if a
    shape or dtype differs.
    """
    pieces = read_pieces(folder)
    for name, tensor in state.items():
        rows, first, _ = distributed.local_rows(tensor.detach())
        if name not in pieces:
            raise UserError(f"{folder} does not hold {name}")
        for piece in pieces[name]:
            if piece.shape != tuple(tensor.shape) or piece.dtype != tensor.dtype:
                raise UserError(
                    f"{folder}: {name} is {list(piece.shape)} {piece.dtype}, the model has "
                    f"{list(tensor.shape)} {tensor.dtype}"
                )
            copy_rows(piece, name, rows, first)


def copy_rows(piece, name, rows, first):
    """Copy a piece into `rows` where they overlap; `first` is the index of the first of `rows`."""
    if rows.dim() == 0:
        rows.copy_(piece.file.get_tensor(name))
        return
    start, end = max(first, piece.first), min(first + len(rows), piece.first + piece.rows)
    if start < end:
        saved = piece.file.get_slice(name)
        rows[start - first : end - first] = saved[start - piece.first : end - piece.first]


def read_pieces(folder):
    """Returns {name: its Pieces in order}, which make up the full tensor. No numbers are read."""
    if (folder / ".metadata").is_file():
        raise UserError(
            f"{folder} was written by an older nanovlm: its .metadata is a pickle, which can run "
            "code, and is not read. Use the last step of that run, which has a model.safetensors"
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
    """Yields (name, Piece) of each tensor in a file."""
    try:
        file = safe_open(path, framework="pt")
        header = json.loads((file.metadata() or {})[HEADER])
        for name in file.keys():  # noqa: SIM118 (no dict)
            first, *shape = header[name]
            rows = file.get_slice(name)
            local_shape = rows.get_shape()
            dtype = rows[:1].dtype if shape else file.get_tensor(name).dtype
            if local_shape[1:] != shape[1:]:
                raise ValueError(f"{name} is {local_shape} here, of {shape}")
            count = local_shape[0] if local_shape else 1
            yield name, Piece(int(first), count, tuple(shape), dtype, file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is broken, cut short or not ours: {type(error).__name__} {error}"
        ) from None


def check_complete(name, pieces, folder):
    """Raises UserError unless the pieces are all rows of one tensor, each row once."""
    shapes, row = {piece.shape for piece in pieces}, 0
    for piece in pieces:
        if piece.first != row:
            verb = "missing" if piece.first > row else "there twice"
            first, last = min(row, piece.first), max(row, piece.first) - 1
            raise UserError(f"{folder}: rows {first} to {last} of {name} are {verb}")
        row += piece.rows
    expected = pieces[0].shape[0] if pieces[0].shape else 1
    if len(shapes) > 1 or row != expected:
        shape = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise UserError(f"{folder}: {row} rows of {name} are there, of shape {shape}")
