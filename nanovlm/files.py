"""Files that every part of the project reads and writes: JSON, folders of pretrained models, and
weight files.

Weights stay in their files (mmap), in their own dtype, until they are used, so a model is in
memory once. All names and shapes are compared with the expected ones before a number is read.
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

# What commit 1c7a388 called the keys of its JSON files, and what they are called now. Keys that
# nothing reads are left out.
OLD_NAMES = {
    "nanovlm.json": {
        "policy": "image_config",
        "template": "chat_template",
        "card": "history",
        "newborn": "random_init",
        "eye": "vision",
        "brain": "decoder",
        "ffn": "intermediate_size",
        "head_size": "head_dim",
        "read": "vision_feature_layer",
        "scaling": "rope_scaling",
        "theta": "rope_theta",
        "vocabulary": "vocab_size",
        "window": "sliding_window",
    },
    "header.json": {"policy": "image_config", "template": "chat_template"},
    "answers.json": {"asked": "settings", "card": "history"},
    "log.jsonl": {
        "validation": "val_loss",
        "blank": "blank_image_loss",
        "exam": "eval_score",
        "rate": "lr",
        "trained": "label_fraction",
        "norm": "grad_norm",
        "norm of vision": "grad_norm_vision",
        "norm of projector": "grad_norm_projector",
        "norm of decoder": "grad_norm_decoder",
        "waited": "data_wait",
        "left": "eta_s",
    },
    "training.json": {
        "batch": "global_batch_size",
        "row": "seq_len",
        "floor": "min_lr",
        "warmup": "warmup_ratio",
        "decay": "weight_decay",
        "clip": "grad_clip",
        "validation": "val_loss",
    },
}

# What commit 1c7a388 called the parameters: (pattern, replacement) pairs for re.sub. They match no
# name of today, so they can be applied to every file.
OLD_PARAMETER_NAMES = [
    (r"\bdecoder\.embed\.", "decoder.embed_tokens."),
    (r"\bdecoder\.head\.", "decoder.lm_head."),
    (r"\.query\.", ".q_proj."),
    (r"\.key\.", ".k_proj."),
    (r"\.value\.", ".v_proj."),
    (r"\.out\.", ".o_proj."),
    (r"\.gate\.", ".gate_proj."),
    (r"\bprojector\.up\.", "projector.linear_1."),
    (r"\bprojector\.down\.", "projector.linear_2."),
    (r"\.up\.", ".up_proj."),
    (r"\.down\.", ".down_proj."),
]

# The largest sizes of models and settings, far beyond any that is published. A larger one is a
# slip of the hand, or a broken or a hostile file, and is refused before it takes memory.
MAX_SIZE = 1 << 20
MAX_SIZES = {
    "layers": 1024,
    "num_hidden_layers": 1024,
    "tile": 8192,
    "tiles": 256,
    "max_position_embeddings": 1 << 30,
    "steps": 1 << 30,
    "epochs": 1024,
    "workers": 1024,
}


def max_size(name):
    return MAX_SIZES.get(name.removeprefix("vision_"), MAX_SIZE)


def size_rules(names):
    """Returns the rules of settings that are sizes, for cli.check_rules: none is beyond its
    largest."""
    rules = []
    for name in names.split():
        most = max_size(name)
        rules.append((name, lambda x, s, most=most: x <= most, f"must be at most {most:,}"))
    return rules


def size_error(name, value):
    """Returns what is wrong with a size that a file names, None if it is plausible."""
    most = max_size(name)
    if type(value) is int and 1 <= value <= most:
        return None
    return f"{name} {value!r:.80} is not a whole number from 1 on, at most {most:,}"


@contextlib.contextmanager
def refuse_odd_values(path):
    """Raises UserError for an error of Python that a stranger's file causes, by a field of another
    kind than its format has."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise UserError(
            f"{path}: a value is of no kind or size that a model can have; restore it: "
            f"{type(error).__name__}: {error}"
        ) from None


def rename_keys(value, names):
    """Returns a JSON value with other keys in its dicts, nested ones too. names: {old: new}."""
    if isinstance(value, list):
        return [rename_keys(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    return {names.get(key, key): rename_keys(item, names) for key, item in value.items()}


def parameter_name(name, renames=OLD_PARAMETER_NAMES):
    """Returns a tensor's name after (pattern, replacement) pairs, each by re.sub. By default,
    they turn an older version's name of a parameter into today's."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def read_text(path):
    """Returns the text of a file in UTF-8. Raises UserError if there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}; save it in UTF-8") from None


def read_json(path, *required, kind=None):
    """Returns the dict in a JSON file, with today's names of its keys.

    required: keys that it must have. kind: a key of OLD_NAMES, by default the file's own name.
    Raises UserError if there is no such file, no dict in it, or no required key.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        # not JSON, a number with thousands of digits, or nested too deeply
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: {content!r:.80}")
    content = rename_keys(content, OLD_NAMES.get(kind or Path(path).name, {}))
    for name in required:
        if name not in content:
            raise UserError(f"{path} holds no {name}")
    return content


@contextlib.contextmanager
def lock_path(path):
    """Lock a file or folder against other processes that lock it; it ends with this process.

    Raises UserError if another process holds the lock.
    """
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


@contextlib.contextmanager
def name_file(path):
    """An OSError inside names the file or folder `path` if it names none, as for a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        raise


def fsync_path(path):
    """Wait until a file, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_text(path, text):
    """Write a file completely or not at all."""
    path = os.path.realpath(path)  # the target of a link, which would be replaced otherwise
    tmp = Path(f"{path}.tmp")
    with name_file(path):
        tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


def read_log(path):
    """Yields the objects of a file of JSON lines, to which a run may still be writing.

    A last line that is incomplete is skipped: a killed run leaves one. Raises UserError if there is
    no such file or if another line is not a JSON object in UTF-8.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    names = OLD_NAMES.get(Path(path).name, {})
    for number, line in enumerate(lines, 1):
        problem = "not a JSON object"
        try:
            content = rename_keys(json.loads(line.decode()), names)
        except (ValueError, RecursionError) as error:
            # not JSON, not UTF-8, a number with thousands of digits, or nested too deeply
            content, problem = None, f"not JSON: {error}"
            if number == len(lines):
                return
        if not isinstance(content, dict):
            raise UserError(f"{path}, line {number}: {problem}; remove the line")
        yield content


# ---- folders of pretrained models ----
def is_repo_id(name):
    """Returns whether a text can be a Hugging Face owner/name, and not a path to a local folder."""
    pattern = r"(?!out/)\w[\w.-]*/[\w.-]+"
    return re.fullmatch(pattern, str(name)) is not None and not Path(name).parent.exists()


def repo_cache(name):
    """Returns the folder of owner/name in the local Hugging Face cache."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    return hub / f"models--{str(name).replace('/', '--')}"


def cached_snapshot(name):
    """Returns the newest folder of owner/name in the local Hugging Face cache, or None."""
    main = repo_cache(name) / "refs" / "main"
    if is_repo_id(name) and main.is_file():
        folder = repo_cache(name) / "snapshots" / main.read_text().strip()
        return folder if (folder / "config.json").is_file() else None


def find_pretrained(name):
    """Returns the folder of a pretrained model: `name` itself, or owner/name in the Hugging Face
    cache, where huggingface_hub puts it if it is installed. Raises UserError if there is none."""
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
            f"{name} is neither a folder nor in {repo_cache(name).parent}; to download it: "
            f"pip install huggingface_hub && hf download {name} --exclude 'consolidated*'"
        ) from None
    return download_pretrained(name, huggingface_hub)


def download_pretrained(name, hub):
    """Download the files of owner/name that are read here, and weights in one format only."""
    try:
        files = hub.list_repo_files(name)
        weights = ".safetensors" if any(f.endswith(".safetensors") for f in files) else ".bin"
        endings = (".json", ".model", ".jinja", "README.md", weights)
        top = [f for f in files if "/" not in f and "consolidated" not in f]
        wanted = [f for f in top if f.endswith(endings)]
        return Path(hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # of the network, of the hub, or for a license not agreed to
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        raise UserError(f"{name} is not a local folder and was not downloaded: {reason}") from None


def weights_source(name, folder, files):
    """Returns the source of a part for the history: its name, its revision, the license in its
    README, and the sha256 of each weight file."""
    source = {"from": str(name), "files": {}}
    if folder.parent.name == "snapshots":
        source["revision"] = folder.name
    if (folder / "README.md").is_file():
        text = (folder / "README.md").read_text(errors="replace")
        header = re.match(r"---\n(.*?)\n---", text, re.S)
        license = header and re.search(r"^license: *(\S+)", header[1], re.M)
        if license:
            source["license"] = license[1]
    for path in files:
        with open(path, "rb") as file:
            source["files"][path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"folder": source}


# ---- tensors ----
def list_weight_files(folder):
    """Returns {path: the names of its tensors}; the names are None if there is no index.

    The order of preference is that of transformers. consolidated.safetensors has another format and
    is not read.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return {folder / single: None}
        index = folder / f"{single}.index.json"
        if index.is_file():
            return read_weight_index(index)
    raise UserError(
        f"{folder} holds neither model.safetensors nor pytorch_model.bin, "
        "as one file or as shards with an index"
    )


def read_weight_index(index):
    """Returns {path: names of its tensors} of a model.safetensors.index.json."""
    weight_map, files = read_json(index).get("weight_map"), {}
    if not weight_map or not isinstance(weight_map, dict):
        raise UserError(f"{index} holds no weight_map")
    for tensor, name in sorted(weight_map.items(), key=lambda item: str(item[1])):
        path = index.parent / str(name)
        # The file may be a link out of the folder, as in Hugging Face's cache; its name may not.
        if path.name != name or not path.is_file():
            raise UserError(f"{index} names {name} for {tensor}, which is not in the folder")
        files.setdefault(path, set()).add(tensor)
    return files


def read_tensors(path):
    """Returns {name: tensor} of a weight file. The numbers stay in the file until they are used.

    Nothing but tensors is unpickled. Raises UserError if the file is missing or broken, or holds
    other objects.
    """
    try:
        if path.suffix != ".bin":
            return load_file(path)
        tensors = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
        is_dict = isinstance(tensors, dict)
        if not is_dict or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise ValueError("not a dict of tensors")
        return tensors
    except FileNotFoundError:
        raise UserError(f"{path} is missing from its checkpoint") from None
    except OSError:
        raise
    except Exception as error:  # a broken pickle raises anything that its bytes spell
        reason, size = str(error).split("\n")[0], os.path.getsize(path)
        raise UserError(
            f"{path} is broken, cut short ({size:,} bytes) or holds more than tensors: {reason}"
        ) from None


def write_tensors(tensors, path, header={}):
    """Write a safetensors file of tensors on any device.

    header: {str: str}, additional metadata of the file. Raises OSError if it cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt", **header})
    except SafetensorError as error:  # safetensors reports a full disk this way
        raise OSError(None, str(error), str(path)) from None


def read_weights(files, renames):
    """Returns {name: (tensor, path)} of all files.

    files: as list_weight_files returns them. renames: (pattern, replacement) pairs for names.
    Raises UserError if a file and its index disagree, or if two files hold one name.
    """
    found = {}
    for path, indexed in files.items():
        tensors = read_tensors(path)
        if indexed and (wrong := sorted(tensors.keys() ^ indexed)):
            verb = "holds" if wrong[0] in tensors else "lacks"
            raise UserError(f"{path} {verb} {wrong[0]}, unlike its folder's index")
        for name, tensor in tensors.items():
            name = parameter_name(name, renames)
            if name in found:
                raise UserError(f"{name} is both in {found[name][1]} and in {path}")
            found[name] = tensor, path
    return found


def match_tensors(shapes, found, ignored, files):
    """Returns {name: tensor} for shapes, {name: shape}.

    found: what read_weights returned for `files`. ignored: a pattern of names that may be unused.
    Raises one UserError that lists the names, shapes and dtypes that do not match.
    """
    problems = [f"{name} is missing" for name in shapes if name not in found]
    for name, (_, path) in found.items():
        if name not in shapes and not re.match(ignored, name):
            problems.append(f"{name} in {path.name} is not used")
    matched = {}
    for name in (name for name in shapes if name in found):
        tensor, path = found[name]
        while tensor.dim() > len(shapes[name]) and len(tensor) == 1:
            tensor = tensor[0]  # DINOv2 stores some vectors with a batch dimension
        if tensor.shape != shapes[name]:
            problems.append(
                f"{name} in {path.name} is {list(tensor.shape)}, the model expects "
                f"{list(shapes[name])}"
            )
        elif not tensor.is_floating_point() or tensor.dtype.itemsize < 2:  # float8 has scales
            problems.append(
                f"{name} in {path.name} has dtype {tensor.dtype}, not float32, bfloat16 or float16"
            )
        matched[name] = tensor
    raise_problems(problems, files)
    return matched


def match_finite_tensors(shapes, found, ignored, files):
    """The same as match_tensors, but also raises UserError if a value is NaN or infinite."""
    matched = match_tensors(shapes, found, ignored, files)
    problems = []
    for name, tensor in matched.items():
        if not all(map(math.isfinite, tensor.aminmax())):
            problems.append(f"{name} in {found[name][1].name} holds a NaN or infinite value")
    raise_problems(problems, files)
    return matched


def raise_problems(problems, files):
    """Raises one UserError with the first ten problems, if there are any."""
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        path = next(iter(files))
        place = path if len(files) == 1 else path.parent
        raise UserError(f"{place}: {'; '.join(problems[:10])}{more}")
