"""Speakers of one model, each in a process of its own: ours, ours without `optimize`, transformers, and llama.cpp where PyPI's llama-cpp-python
and gguf are installed. sample.py beside this is what to run.
"""

import gc
import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from nanovlm.checkpoints import huggingface  # noqa: E402
from nanovlm.inference.generate import generate  # noqa: E402
from nanovlm.inference.optimize import optimize  # noqa: E402
from nanovlm.models.vlm import VLM  # noqa: E402

PROMPT = "<|im_start|>user\nTell a long story about the keeper of a lighthouse and his dog.<|im_end|>\n<|im_start|>assistant\n"
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # llama.cpp's names, Hugging Face's


# ---- A speaker is made of a folder and a dtype: a function of a prompt's ids, a count and `say`, which it calls with each of so many ids ----


def ours(folder, dtype, ready=True):
    part = huggingface.read_decoder(folder)
    eye = dict(
        tile=2, patch=1, width=4, layers=1, heads=1, intermediate_size=1
    )  # nothing is looked at
    model = VLM(vision=eye, decoder=part.shapes["decoder"] | {"layers": 0, "vocab_size": 1})
    model.decoder = part.model.decoder
    model = model.to(dtype).eval()
    if ready:
        optimize(model)

    def speak(ids, count, say):
        for (i,) in generate(model, [ids], torch.zeros(0), stop=set(), max_tokens=count):
            say(i)

    return speak


def plain(folder, dtype):
    return ours(folder, dtype, ready=False)


def transformers(folder, dtype):
    import transformers as hf

    class Streamer:
        def __init__(self, say):
            self.say, self.prompt = say, True

        def put(self, ids):
            if not self.prompt:  # it is streamed first
                self.say(ids.item())
            self.prompt = False

        def end(self):
            pass

    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return lambda ids, count, say: model.generate(
        torch.tensor([ids]),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        streamer=Streamer(say),
    )


def write_gguf(folder, out, dtype):
    """The folder's brain as llama.cpp reads it, without a tokenizer."""
    import gguf
    from safetensors.torch import load_file

    config, tensors = (
        json.loads((Path(folder) / "config.json").read_text()),
        load_file(Path(folder) / "model.safetensors"),
    )
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for i in range(config["num_hidden_layers"]):
        names |= {f"blk.{i}.{theirs}": f"model.layers.{i}.{name}" for theirs, name in BLOCK.items()}
    file = gguf.GGUFWriter(out, "llama")
    for tell, name in [
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("feed_forward_length", "intermediate_size"),
        ("head_count", "num_attention_heads"),
        ("head_count_kv", "num_key_value_heads"),
        ("layer_norm_rms_eps", "rms_norm_eps"),
        ("rope_freq_base", "rope_theta"),
        ("vocab_size", "vocab_size"),
    ]:
        getattr(file, f"add_{tell}")(config[name])
    file.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    file.add_tokenizer_model("none")
    for theirs, name in names.items():
        weight = tensors[f"{name}.weight"]
        if count := heads.get(
            theirs.split(".")[-1]
        ):  # llama.cpp turns neighbours by RoPE, Hugging Face the pair (i, i + K/2)
            weight = (
                weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            )
        if weight.dim() == 1 or dtype == torch.float32:
            file.add_tensor(f"{theirs}.weight", weight.float().contiguous().numpy())
        else:
            kind = {
                torch.bfloat16: gguf.GGMLQuantizationType.BF16,
                torch.float16: gguf.GGMLQuantizationType.F16,
            }[dtype]
            file.add_tensor(
                f"{theirs}.weight",
                weight.to(dtype).contiguous().view(torch.uint8).numpy(),
                raw_dtype=kind,
            )
    (
        file.write_header_to_file(),
        file.write_kv_data_to_file(),
        file.write_tensors_to_file(),
        file.close(),
    )


def llama_cpp(folder, dtype):
    import llama_cpp
    import numpy as np

    with tempfile.TemporaryDirectory() as tmp:
        write_gguf(folder, f"{tmp}/model.gguf", dtype)
        threads = torch.get_num_threads()
        model = llama_cpp.Llama(
            f"{tmp}/model.gguf",
            n_ctx=2048,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def speak(ids, count, say):
        model.reset()
        for _ in range(count):
            model.eval(ids)
            logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            ids = [int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())]
            say(ids[0])

    return speak


def time_of(speak, ids, count):
    """(what is said, seconds to the first of it, the median of seconds to each other)"""
    said, times = [], [time.perf_counter()]

    def say(i):
        said.append(i)
        times.append(time.perf_counter())

    speak(ids, count, say)
    first, *others = (after - before for before, after in itertools.pairwise(times))
    return said, first, statistics.median(others)


def stand(speaker, folder, dtype, threads, pipe):
    """A process of its own for a speaker, so that its memory is its own: it tells of (ids, count) as they come in, until None comes."""
    torch.set_num_threads(threads)
    speak = speaker(folder, dtype)
    while True:
        gc.collect()
        pipe.send(
            int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        )  # MB that it holds now
        if (asked := pipe.recv()) is None:
            return
        pipe.send(time_of(speak, *asked))


def speech(folder, dtype, threads, tokens, rounds):
    """Print tokens a second, the first token's time and the memory of each speaker, all in turns, and beside ours: medians over the rounds."""
    speakers = [ours, plain, transformers]
    if missing := [
        name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None
    ]:
        print(f"llama.cpp does not take part: {' and '.join(missing)} not installed")
    else:
        speakers.append(llama_cpp)
    spawn, stands = multiprocessing.get_context("spawn"), []
    ids, pipes = huggingface.read_decoder(folder, tensors=False).tokenizer.encode(PROMPT), {}
    for speaker in speakers:
        pipes[speaker], end = spawn.Pipe()
        stands.append(
            spawn.Process(target=stand, args=(speaker, folder, dtype, threads, end), daemon=True)
        )
        stands[-1].start()
    found, memory = (
        {speaker: [] for speaker in speakers},
        {speaker: pipe.recv() for speaker, pipe in pipes.items()},
    )
    for _ in range(rounds + 1):
        for speaker, pipe in pipes.items():
            pipe.send((ids, tokens))
            found[speaker].append(pipe.recv())
            memory[speaker] = pipe.recv()
    for pipe in pipes.values():
        pipe.send(None)
    for process in stands:
        process.join()
    cores = f"{threads} thread{'s' * (threads > 1)}"
    print(
        f"{Path(folder).name} in {str(dtype).removeprefix('torch.')}, {cores}, {len(ids)} tokens of prompt, {tokens} generated:"
    )
    for speaker in speakers:
        rows = list(zip(found[speaker], found[ours], strict=True))[1:]  # the first round warms up
        said, first, each = (
            statistics.median(theirs[i] for theirs, _ in rows) if i else rows[0][0][0]
            for i in range(3)
        )
        slower = statistics.median(theirs[2] / own[2] for theirs, own in rows)
        same = next(
            (n for n, (a, b) in enumerate(zip(said, rows[0][1][0], strict=True)) if a != b), tokens
        )
        print(
            f"{speaker.__name__:12} {1 / each:6.1f} tokens/s, {1 / slower:.2f} of ours; the first after {first * 1000:.0f} ms; "
            f"{memory[speaker]:,.0f} MB; the first {same} tokens are ours"
        )
