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
    """Consecutive rows of a tensor, in one file. A scalar is one row."""

    first: int
    rows: torch.Tensor  # they stay in the file until they are used (mmap)
    shape: tuple  # of the full tensor


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
            tensors[name] = rows
            header[name] = [first, *tensor.shape]
    folder.mkdir(exist_ok=True)
    path = folder / f"rank-{distributed.get_rank():05d}.safetensors"
    write_tensors(tensors, path, {HEADER: json.dumps(header)})


def read_shards(state, folder):
    """Copy saved rows into {name: tensor}; this rank may hold only some rows of a tensor.

    Ranks read independently. Raises UserError if a file is broken, if rows are missing, if a shape
    differs, or if a tensor cannot hold the numbers of a saved dtype.
    """
    pieces = read_pieces(folder)
    for name, tensor in state.items():
        if name not in pieces:
            raise UserError(f"{folder} does not hold {name}")
        rows, first, _ = distributed.local_rows(tensor.detach())
        rows = torch.atleast_1d(rows)
        for piece in pieces[name]:
            wide = torch.promote_types(piece.rows.dtype, tensor.dtype)
            if piece.shape != tuple(tensor.shape) or wide != tensor.dtype:
                raise UserError(
                    f"{folder}: {name} is {list(piece.shape)} {piece.rows.dtype}, the model has "
                    f"{list(tensor.shape)} {tensor.dtype}"
                )
            end = piece.first + len(piece.rows)
            start, end = max(first, piece.first), min(first + len(rows), end)
            if start < end:
                saved = piece.rows[start - piece.first : end - piece.first]
                rows[start - first : end - first] = saved


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


def read_dtypes(folder):
    """Returns {name: dtype} of the tensors in a folder. No numbers are read."""
    return {name: pieces[0].rows.dtype for name, pieces in read_pieces(folder).items()}


def read_file_pieces(path):
    """Yields (name, Piece) of each tensor in a file."""
    try:
        file = safe_open(path, framework="pt")
        header = json.loads((file.metadata() or {})[HEADER])
        for name in file.keys():  # noqa: SIM118 (no dict)
            first, *shape = header[name]
            rows = file.get_tensor(name)
            if list(rows.shape[1:]) != shape[1:]:
                raise ValueError(f"{name} is {list(rows.shape)} here, of {shape}")
            yield name, Piece(int(first), torch.atleast_1d(rows), tuple(shape))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is broken, cut short or not ours: {type(error).__name__} {error}"
        ) from None


def check_complete(name, pieces, folder):
    """Raises UserError unless the pieces are all rows of a tensor, each row once."""
    row = 0
    for piece in pieces:
        if piece.first != row:
            verb = "missing" if piece.first > row else "there twice"
            first, end = sorted((row, piece.first))
            raise UserError(f"{folder}: rows {first} to {end - 1} of {name} are {verb}")
        row += len(piece.rows)
    shape = pieces[0].shape
    if row != (shape[0] if shape else 1):
        raise UserError(f"{folder}: {row} rows of {name} are there, of shape {list(shape)}")
