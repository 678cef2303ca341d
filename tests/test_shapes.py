"""Names carry shapes, and no name lies.

Our files run with sizes that all differ, while this test looks at every local variable, line by
line. A name such as q_BTHK must have as many dimensions as letters. Within a function a capital
letter means one size at any moment, whichever names carry it; so does an int named T. A lower-case
letter is no more than its capital; 1 is 1. The size of some letters is known in advance.
"""

import ast
import base64
import contextlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from conftest import DECODER, ROOT, VISION, make_vlm, write_set
from PIL import Image

import nanovlm
import prepare
import sample
from nanovlm import IMAGE_TOKEN_ID
from nanovlm.checkpoints import huggingface, stitch
from nanovlm.checkpoints.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from nanovlm.data import dataset, image_files, image_processing, packing, tokenizer
from nanovlm.evals import runner
from nanovlm.inference.generate import CAPTURE_AFTER, generate
from nanovlm.inference.optimize import optimize
from nanovlm.kernels import dispatch
from nanovlm.models.attention import attention
from nanovlm.models.cross_entropy import linear_cross_entropy
from nanovlm.preprocess import build
from nanovlm.training import flops, memory, validation
from nanovlm.visualize import attention_map

ALPHABET = "".join(
    re.findall(
        r"(?<= )[A-Z](?= )",
        "".join(line for line in nanovlm.__doc__.splitlines() if line.startswith("    ")),
    )
)
CARRIES = re.compile(rf"[a-z]\w*_([{ALPHABET}{ALPHABET.lower()}1]+)$")
# A capital in the last part of a name: it is meant to carry a shape.
LOOKS_LIKE = re.compile(r"[a-z]\w*_[A-Za-z]*[A-Z]\w*$")

# 36 patches, 9 tokens after pixel shuffle by 2
VISION_SHAPES = VISION | {"tile": 18, "class_token": True, "layer_scale": True}
DECODER_SHAPES = DECODER | {"vocab_size": 260, "sliding_window": [None, 14, None]}
DECODER_SHAPES |= {"qkv_bias": True, "qk_norm": True, "rope_layers": [1, 0, 1]}
IMAGE_CONFIG = {
    "tile": 18,
    "patch": 3,
    "shuffle": 2,
    "fit": "crop",
    "resample": "bicubic",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
}
# A PNG of 5 × 4 pixels in 16-bit color, one of them transparent. Pillow cannot write it.
DEEP = (
    "iVBORw0KGgoAAAANSUhEUgAAAAUAAAAEEAIAAACZwb5UAAAABnRSTlMAAAAAAAfwwpIyAAAADElEQVR4"
    "nGNgGDgAAAB8AAHDeixIAAAAAElFTkSuQmCC"
)
C = {"C": 3}
# {file: the sizes of a letter in it; several if two parts of the model share the file}
KNOWN = {
    "models/decoder.py": {"D": 24, "H": 6, "G": 2, "K": 8, "V": 260},
    "models/vision_encoder.py": C | {"D": 20, "H": 5, "K": 4, "P": (36, 37)},  # 37: class token
    "models/attention.py": {"H": (6, 5), "G": (2, 5), "K": (8, 4)},
    "kernels/attention.py": {"H": (6, 5), "G": (2, 5), "K": (8, 4)},
    "kernels/attention_forward.py": {"K": 16},  # a block
    "kernels/attention_backward_dq.py": {"K": 16},
    "kernels/attention_backward_dkdv.py": {"K": 16},
    "models/cross_entropy.py": {"D": 24, "V": 260},
    "models/vlm.py": C | {"D": (24, 20), "V": 260},
    "models/projector.py": C | {"D": (24, 20), "P": (36, 9)},
    "data/image_processing.py": C,
    "data/dataset.py": C | {"Y": 18, "X": 18},
    "data/packing.py": C | {"Y": 18, "X": 18},
    "visualize/samples.py": C | {"Y": 18, "X": 18},
}
FILES = [*ROOT.glob("*.py"), *ROOT.glob("nanovlm/**/*.py")]


def shape_of(value):
    """The shape of a tensor, an array or a list of numbers; None of anything else."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return tuple(value.shape)
    # A block in a kernel, in Triton's interpreter. A number there has no shape.
    if isinstance(value, tl.tensor) and value.shape:
        return tuple(map(int, value.shape))
    return (
        (len(value),)
        if isinstance(value, list) and all(isinstance(x, int) for x in value)
        else None
    )


def lies_of(variables, known):
    """Yields a sentence for each variable of a function whose shape is not what its name says."""
    sizes = {
        name: (value, name)
        for name, value in variables.items()
        if len(name) == 1 and name in ALPHABET and isinstance(value, int)
    }
    parts = []
    for name, value in variables.items():
        match, shape = CARRIES.match(name), shape_of(value)
        if (
            not match or value is None or (shape is None and match[1].islower())
        ):  # top_p is a number
            continue
        letters = match[1]
        if shape is None or len(shape) != len(letters):
            yield f"{name} is {type(value).__name__} of shape {shape}"
            continue
        for letter, size in zip(letters, shape, strict=True):
            if letter.islower():
                parts.append((letter, size, name, shape))
                continue
            allowed = 1 if letter == "1" else known.get(letter, size)
            if size not in (allowed if isinstance(allowed, tuple) else (allowed,)):
                yield f"{name} has shape {shape}, {letter} is {allowed}"
            elif letter != "1" and sizes.setdefault(letter, (size, name))[0] != size:
                known_size, other = sizes[letter]
                yield f"{name} has shape {shape}, but {letter} is {known_size} in {other}"
    for letter, size, name, shape in parts:
        if size > sizes.get(letter.upper(), (size, ""))[0]:
            capital = letter.upper()
            yield f"{name} has shape {shape}, but all of {capital} is {sizes[capital][0]}"


@contextlib.contextmanager
def watching(*folders):
    """Looks at the variables of every function in the folders' files.

    Yields (lies, the {(file, name)} that carried a shape).
    """
    lies, seen = {}, set()

    def enter(frame, event, arg):
        return look if Path(frame.f_code.co_filename).parent in folders else None

    def look(frame, event, arg):
        file, variables = place(Path(frame.f_code.co_filename)), dict(frame.f_locals)
        for lie in lies_of(variables, KNOWN.get(file, {})):
            lies.setdefault(
                lie, f"{file}, before line {frame.f_lineno}, in {frame.f_code.co_name}: {lie}"
            )
        seen.update(
            (file, name)
            for name, value in variables.items()
            if CARRIES.match(name) and shape_of(value) is not None
        )
        return look

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield lies, seen
    finally:
        sys.settrace(before)


def place(path):
    """A file as KNOWN names it: by its path in nanovlm/, if it lies there."""
    package = ROOT / "nanovlm"
    return path.relative_to(package).as_posix() if package in path.parents else path.name


def names_in(path):
    """The variables and parameters of a file, with their lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def everything(folder):
    """Run all of the project, in sizes that all differ: 7 sequences, 3 channels, 5 images …"""
    words = tokenizer.train_tokenizer(["a b"], 256, ["<s>", "[INST]", "[/INST]", "</s>"])
    shapes = {"vision": VISION_SHAPES, "decoder": DECODER_SHAPES, "shuffle": 2}
    model = make_vlm(vision=VISION_SHAPES, decoder=DECODER_SHAPES)
    save_checkpoint(
        Checkpoint(model, words, shapes, IMAGE_CONFIG, "mistral", {"random_init": "here"}),
        folder / "model",
    )
    checkpoint = load_checkpoint(folder / "model")
    save_checkpoint(stitch.stitch_parts(checkpoint, checkpoint, 0), folder / "stitched")
    huggingface.resize_position_embeddings(torch.randn(37, 20), 8, leading=1)

    g = np.random.default_rng(0)
    Image.fromarray(g.integers(65536, size=(29, 23), dtype=np.uint16)).save(folder / "grey.png")
    Image.fromarray(g.integers(256, size=(23, 29, 3), dtype=np.uint8)).save(folder / "colour.png")
    for fit in image_processing.FITS:
        image_processing.load_image(folder / "colour.png", IMAGE_CONFIG | {"fit": fit})
    anyres = IMAGE_CONFIG | {"fit": "anyres", "pinpoints": [[18, 36], [36, 18]]}
    image_processing.load_image(folder / "colour.png", anyres)
    image_processing.load_image(
        folder / "colour.png",
        IMAGE_CONFIG
        | {"fit": "tiles", "tiles": 4, "choice": "aspect", "thumbnail": True, "tags": True},
    )
    build_model(shapes, anyres).embed(
        torch.full((1, 10), IMAGE_TOKEN_ID),
        torch.zeros(1, 3, 18, 18, dtype=torch.uint8),
        torch.arange(10) - 1,
    )
    colour, grey = (
        image_processing.load_image(folder / name, IMAGE_CONFIG)
        for name in ("colour.png", "grey.png")
    )
    image_processing.tile_to_image(grey.tiles[0])
    (folder / "captions.json").write_text('[{"image": "colour.png", "caption": "x"}]')
    build.measure_pixels([str(folder / "captions.json")], str(folder), IMAGE_CONFIG)
    (folder / "deep.png").write_bytes(base64.b64decode(DEEP))
    image_files.read_image(folder / "deep.png")

    written = [[IMAGE_TOKEN_ID] * (i % 3 == 0) + list(range(65, 70 + i % 11)) for i in range(300)]
    write_set(
        folder / "set",
        checkpoint.fingerprint(),
        [
            (f"sample {i}", ids, [0] * (len(ids) - 3) + [1, 1, 0], [colour] if i % 3 == 0 else [])
            for i, ids in enumerate(written)
        ],
    )
    checkpoint.tokenizer.save(folder / "set")
    for out in ("tiles.png", "page.html"):
        prepare.show(data=str(folder / "set"), sample=["sample 3"], out=str(folder / out))
    flops.assumed_sequence(51, IMAGE_CONFIG)
    samples = dataset.PreparedDataset(folder / "set")
    (batch, _), *_ = next(
        packing.PackedDataLoader(
            samples, seq_len=51, global_batch_size=7, micro_batch_size=7, seed=1
        )
    )
    model.train()(**batch).backward()
    run = SimpleNamespace(micro_batch_size=1, global_batch_size=1, activation_checkpointing="none")
    memory.estimate_memory(run, model, batch, torch.device("cpu"), torch.float32)
    none = packing.collate(samples, [[i] for i in range(300) if i % 3][:7])[0]
    model(**none).backward()
    # Three short sequences: the interpreter is slow if each of its lines is looked at.
    with mock.patch.object(dispatch, "choice", "triton"):
        one = make_vlm(
            vision=VISION_SHAPES, decoder=DECODER_SHAPES | {"layers": 1, "sliding_window": 14}
        ).decoder
        one(
            torch.randn(3, 19, 24),
            torch.arange(19).expand(3, -1),
            torch.arange(57).view(3, 19) // 11,
        ).sum().backward()
        linear_cross_entropy(torch.randn(3, 24), torch.randn(260, 24), torch.tensor([5, 0, 7]))
        with torch.no_grad():  # and the newest token alone
            attention(
                torch.randn(3, 1, 6, 8),
                *torch.randn(2, 3, 19, 2, 8),
                documents_BS=torch.arange(57).view(3, 19) // 11,
            )
    for scaling in (
        {
            "rope_type": "llama3",
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 20,
        },
    ):
        make_vlm(vision=VISION_SHAPES, decoder=DECODER_SHAPES | {"rope_scaling": scaling})(**none)

    questions = [
        ("<image>a longer question", [colour]),
        ("x", []),
        ("<image><image>two", [colour, grey]),
    ]
    for how in ({"temperature": 1.0, "top_k": 50}, {"logprobs": True}):
        runner.generate_answers(checkpoint, questions, max_tokens=5, **how)
    runner.generate_answers(checkpoint, questions, blank_images=True, max_tokens=2)
    list(sample.stream_answer(checkpoint, [("user", "<image>x")], [colour], max_tokens=3))
    record = attention_map.record_answer(
        checkpoint, [("user", "<image>x")], [colour], with_lens=True, max_tokens=3
    )
    attention_map.write_page(record, folder / "attention.html")
    attention_map.write_image(record, folder / "attention.png")
    optimized = optimize(load_checkpoint(folder / "model").model)
    list(
        generate(
            optimized,
            [[3, 4, 5], [6, 7]],
            torch.zeros(0, 3, 18, 18),
            stop=set(),
            max_tokens=CAPTURE_AFTER + 4,
            cuda_graph=("cpu",),
        )
    )
    validation.validate(
        checkpoint, samples, validation.pack_validation_set(samples, 51), contextlib.nullcontext()
    )


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    with watching(*{path.parent for path in FILES}) as (lies, seen):
        everything(tmp_path_factory.mktemp("project"))
    return lies, seen


def test_no_name_lies_about_its_shape(looked):
    lies, _ = looked
    assert not lies, "\n".join(lies.values())


def test_every_name_that_carries_a_shape_was_looked_at(looked):
    _, seen = looked
    wanted = {
        (place(path), name)
        for path in FILES
        for name, _ in names_in(path)
        if LOOKS_LIKE.match(name) and CARRIES.match(name)
    }
    assert len(wanted) > 80 and not wanted - seen, (
        f"`everything` must run what sets {sorted(wanted - seen)}"
    )


def test_every_letter_is_in_the_alphabet():
    assert set(ALPHABET) >= set("BTNDHK")
    strangers = [
        f"{place(path)}:{line} {name}"
        for path in FILES
        for name, line in names_in(path)
        if LOOKS_LIKE.match(name) and not CARRIES.match(name)
    ]
    assert not strangers, f"letters that nanovlm/__init__.py does not explain: {strangers}"


@pytest.mark.parametrize(
    "lines, lie",
    [
        ("x_BTD = torch.zeros(2, 5)", "x_BTD is Tensor of shape (2, 5)"),
        (
            "q_BTHK = torch.zeros(2, 7, 4, 5); k_BTHK = q_BTHK.transpose(1, 2)",
            "k_BTHK has shape (2, 4, 7, 5), but T is 7 in q_BTHK",
        ),
        ("T = 6; ids_BT = np.zeros((6, 9))", "ids_BT has shape (6, 9), but T is 6 in T"),
        ("cos_BT1K = torch.zeros(2, 7, 3, 5)", "cos_BT1K has shape (2, 7, 3, 5), 1 is 1"),
        (
            "targets_N = torch.zeros(4); logits_nV = torch.zeros(5, 9)",
            "logits_nV has shape (5, 9), but all of N is 4",
        ),
        ("next_B = [1, 2]; pad_B = torch.zeros(3)", "pad_B has shape (3,), but B is 2 in next_B"),
        ("angle_k = torch.zeros(2, 3)", "angle_k is Tensor of shape (2, 3)"),
        ("x_BT = 'text'", "x_BT is str of shape None"),
        (
            "x_BT = torch.zeros(2, 3); x_BT = x_BT.T; y_BT = torch.zeros(2, 3)",
            "y_BT has shape (2, 3), but B is 3 in x_BT",
        ),
        (
            "x_BT = torch.zeros(2, 3); x_BT = torch.zeros(4, 3); top_p = 0.5; rest_BTD = None",
            None,
        ),  # a name may move on
        ("x_BT = torch.zeros(2, 3); first_Bt = x_BT[:, :1]; wave_Tk = torch.zeros(3, 9)", None),
    ],
)
def test_a_lie_is_caught(tmp_path, lines, lie):
    (tmp_path / "liar.py").write_text(
        "import numpy as np\nimport torch\n\ndef liar():\n    "
        + lines.replace("; ", "\n    ")
        + "\n"
    )
    space = {}
    exec(compile((tmp_path / "liar.py").read_text(), str(tmp_path / "liar.py"), "exec"), space)
    with watching(tmp_path) as (lies, _):
        space["liar"]()
    assert list(lies)[:1] == ([lie] if lie else [])


def test_a_size_known_in_advance_is_checked():
    assert list(lies_of({"q_BTHK": torch.zeros(2, 7, 5, 6)}, KNOWN["models/decoder.py"])) == [
        "q_BTHK has shape (2, 7, 5, 6), H is 6",
        "q_BTHK has shape (2, 7, 5, 6), K is 8",
    ]
