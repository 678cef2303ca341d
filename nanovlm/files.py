"""The files of a model: where a public folder lies, and its tensors, read so strictly that whatever is missing, cut short or odd is named.

Tensors stay in their files (mmap) and in their dtype until they are used, so that a model is in memory once. All names and shapes are held
against what is wanted before the first number is read.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import UserError

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_json(path, *names):
    """The object in a JSON file, which must have these names."""
    try:
        found = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # no JSON, no UTF-8, a number of thousands of digits, nested too deep
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no object: {found!r:.80}")
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{path} holds no {missing[0]}")
    return found


@contextlib.contextmanager
def lock_path(path):
    """Keep other processes out of a file or folder as long as it is written to: UserError if one of them does. A claim ends with its process."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"{path} is being written by another process") from None
    try:
        yield
    finally:
        os.close(handle)


def write_text(path, text):
    """Whole or not at all."""
    path = os.path.realpath(path)  # where a link leads, or the link would be replaced
    tmp = Path(f"{path}.tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


def read_log(path):
    """The objects of a file of JSON lines, to which a run may be writing: the last may have been torn by what stopped it, and is left out then."""
    try:
        lines = Path(path).read_text().splitlines()
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise UserError(f"{path}, line {number}: not JSON") from None


# ---- where a public folder lies ----
def is_repo_id(name):
    """Whether a text may be an owner/name, as Hugging Face has them, and not a path into a folder that is here."""
    return (
        re.fullmatch(r"(?!out/)\w[\w.-]*/[\w.-]+", str(name)) is not None
        and not Path(name).parent.exists()
    )


def repo_cache(name):
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return (
        Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
        / f"models--{str(name).replace('/', '--')}"
    )


def cached_snapshot(name):
    """The folder in which the local Hugging Face cache holds owner/name, or None."""
    main = repo_cache(name) / "refs" / "main"
    if is_repo_id(name) and main.is_file():
        folder = repo_cache(name) / "snapshots" / main.read_text().strip()
        return folder if (folder / "config.json").is_file() else None


def find_pretrained(name):
    """The folder of a public model: the one that is named, or the one that the Hugging Face cache holds of owner/name; fetched if it can be."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"{name} holds neither a nanovlm checkpoint nor a config.json")
        return Path(name)
    if not is_repo_id(name):
        raise UserError(f"no such folder: {name}")
    if folder := cached_snapshot(name):
        return folder
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{name} is neither a folder nor in {repo_cache(name).parent}; to fetch it: "
            f"pip install huggingface_hub && hf download {name} --exclude 'consolidated*'"
        ) from None
    return download_pretrained(name, huggingface_hub)


def download_pretrained(name, hub):
    """Download what we read of owner/name: of its weights only one spelling."""
    try:
        files = hub.list_repo_files(name)
        kind = ".safetensors" if any(f.endswith(".safetensors") for f in files) else ".bin"
        wanted = [
            f
            for f in files
            if f.endswith((".json", ".model", ".jinja", "README.md", kind))
            and "/" not in f
            and "consolidated" not in f
        ]
        return Path(hub.snapshot_download(name, allow_patterns=wanted))
    except (
        Exception
    ) as error:  # of whatever kind: the network's, the hub's, a licence not yet agreed to
        raise UserError(
            f"{name} is no folder here and could not be fetched: {type(error).__name__} {' '.join(str(error).split())[:200]}"
        ) from None


def weights_source(name, folder, files):
    """Where a part came from: name, licence if its README states one, and the sha256 of each of its weight files."""
    card = {"from": str(name), "files": {}}
    if folder.parent.name == "snapshots":
        card["revision"] = folder.name
    front = (
        re.match(r"---\n(.*?)\n---", (folder / "README.md").read_text(errors="replace"), re.S)
        if (folder / "README.md").is_file()
        else None
    )
    if front and (licence := re.search(r"^license: *(\S+)", front[1], re.M)):
        card["licence"] = licence[1]
    for path in files:
        with open(path, "rb") as file:
            card["files"][path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"folder": card}


# ---- tensors ----
def list_weight_files(folder):
    """{file: the tensors that an index says it holds, or None without an index}, as transformers chooses among the files of a folder;
    consolidated.safetensors is another format."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return {folder / single: None}
        index = folder / f"{single}.index.json"
        if index.is_file():
            return read_weight_index(index)
    raise UserError(
        f"{folder} holds neither model.safetensors nor pytorch_model.bin, whole or in shards with an index"
    )


def read_weight_index(index):
    listed, files = read_json(index).get("weight_map"), {}
    if (
        not listed
        or not isinstance(listed, dict)
        or not all(isinstance(file, str) for file in listed.values())
    ):
        raise UserError(f"{index} holds no weight_map")
    for tensor, name in sorted(listed.items(), key=lambda item: item[1]):
        path = index.parent / name
        if (
            Path(name).name != name or not path.is_file()
        ):  # a link that leads out of the folder is how Hugging Face's cache is laid out
            raise UserError(f"{index} names {name} for {tensor}, which is not in the folder")
        files.setdefault(path, set()).add(tensor)
    return files


def read_tensors(path):
    """{name: tensor} of a weights file, left in the file until they are used. Only tensors are ever unpickled."""
    try:
        if path.suffix != ".bin":
            return load_file(path)
        tensors = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
        if not isinstance(tensors, dict) or not all(
            isinstance(tensor, torch.Tensor) for tensor in tensors.values()
        ):
            raise ValueError("no tensors by name")
        return tensors
    except FileNotFoundError:
        raise UserError(f"{path} is missing from its checkpoint") from None
    except OSError:
        raise
    except Exception as error:  # of whatever kind: what the bytes of a broken pickle happen to say
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{path} is broken, cut short ({os.path.getsize(path):,} bytes) or holds more than tensors: {reason}"
        ) from None


def write_tensors(tensors, path, header={}):
    """header: {str: str}, what else the file's header says."""
    try:
        save_file(tensors, path, metadata={"format": "pt", **header})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"could not write {path}: {error}") from None


def read_weights(files, wrapped):
    """{plain name: (tensor, file)} of all files, as weight_files gives them; wrapped: what makes names plain, (pattern, replacement) each."""
    found = {}
    for path, listed in files.items():
        tensors = read_tensors(path)
        if odd := sorted(tensors.keys() ^ listed) if listed else []:
            raise UserError(
                f"{path} {'holds' if odd[0] in tensors else 'lacks'} {odd[0]}, its folder's index says otherwise"
            )
        for name, tensor in tensors.items():
            for pattern, plain in wrapped:
                name = re.sub(pattern, plain, name)
            if name in found:
                raise UserError(f"{name} is both in {found[name][1]} and in {path}")
            found[name] = tensor, path
    return found


def match_tensors(shapes, found, unread, files):
    """{name: tensor} for {name: shape}, out of what read_weights found in files. Every name, shape and kind of number must match, or one UserError
    lists those that do not; unread: a pattern of names that may be left over."""
    wrong = [f"{name} is missing" for name in shapes if name not in found]
    wrong += [
        f"{name} in {path.name} is not used"
        for name, (_, path) in found.items()
        if name not in shapes and not re.match(unread, name)
    ]
    fitting = {}
    for name in (name for name in shapes if name in found):
        tensor, path = found[name]
        while (
            tensor.dim() > len(shapes[name]) and len(tensor) == 1
        ):  # DINOv2 keeps a dimension for the batch
            tensor = tensor[0]
        if tensor.shape != shapes[name]:
            wrong.append(
                f"{name} in {path.name} is {list(tensor.shape)}, the model wants {list(shapes[name])}"
            )
        elif tensor.dtype not in FLOAT_DTYPES:
            wrong.append(
                f"{name} in {path.name} is of {tensor.dtype}, only {', '.join(map(str, FLOAT_DTYPES))} are known here"
            )
        fitting[name] = tensor
    raise_problems(wrong, files)
    return fitting


def match_finite_tensors(shapes, found, unread, files):
    """The same, all numbers finite."""
    fitting = match_tensors(shapes, found, unread, files)
    raise_problems(
        [
            f"{name} in {found[name][1].name} holds a number that is not finite"
            for name, tensor in fitting.items()
            if not all(map(math.isfinite, tensor.aminmax()))
        ],
        files,
    )
    return fitting


def raise_problems(wrong, files):
    if wrong:
        path, more = next(iter(files)), f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise UserError(
            f"{path if len(files) == 1 else path.parent}: {'; '.join(wrong[:10])}{more}"
        )
