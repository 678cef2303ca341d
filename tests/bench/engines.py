"""Generation by several engines, each in a process of its own: ours, ours without `optimize`,
transformers, and llama.cpp if llama-cpp-python and gguf of PyPI are installed.

tests/bench/sample.py runs this file.
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

PROMPT = (
    "<|im_start|>user\nTell a long story about the keeper of a lighthouse and his dog.<|im_end|>\n"
    "<|im_start|>assistant\n"
)
BLOCK = {  # llama.cpp's names: Hugging Face's
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


# ---- engines ----
# An engine is a function of a folder and a dtype. It returns a function of a prompt's ids, a number
# of tokens and on_token, which is called with the id of each token.


def ours(folder, dtype, optimized=True):
    part = huggingface.read_decoder(folder)
    # There is no image.
    vision = dict(tile=2, patch=1, width=4, layers=1, heads=1, intermediate_size=1)
    model = VLM(vision=vision, decoder=part.shapes["decoder"] | {"layers": 0, "vocab_size": 1})
    model.decoder = part.model.decoder
    model = model.to(dtype).eval()
    if optimized:
        optimize(model)

    def run(ids, count, on_token):
        for (i,) in generate(model, [ids], torch.zeros(0), stop=set(), max_tokens=count):
            on_token(i)

    return run


def plain(folder, dtype):
    return ours(folder, dtype, optimized=False)


def transformers(folder, dtype):
    import transformers as hf

    class Streamer:
        def __init__(self, on_token):
            self.on_token, self.is_prompt = on_token, True

        def put(self, ids):
            if not self.is_prompt:  # transformers streams the prompt first
                self.on_token(ids.item())
            self.is_prompt = False

        def end(self):
            pass

    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return lambda ids, count, on_token: model.generate(
        torch.tensor([ids]),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        streamer=Streamer(on_token),
    )


def write_gguf(folder, out, dtype):
    """The language model of a folder as a file for llama.cpp, without a tokenizer."""
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
    for key, name in [
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
        getattr(file, f"add_{key}")(config[name])
    file.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    file.add_tokenizer_model("none")
    for theirs, name in names.items():
        weight = tensors[f"{name}.weight"]
        count = heads.get(theirs.split(".")[-1])
        if count:  # RoPE rotates neighbours in llama.cpp, the pair (i, i + K/2) in Hugging Face
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
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


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

    def run(ids, count, on_token):
        model.reset()
        for _ in range(count):
            model.eval(ids)
            logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            ids = [int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())]
            on_token(ids[0])

    return run


def time_tokens(run, ids, count):
    """Returns (generated ids, seconds to the first token, median seconds of each later one)."""
    generated, times = [], [time.perf_counter()]

    def on_token(i):
        generated.append(i)
        times.append(time.perf_counter())

    run(ids, count, on_token)
    first, *others = (after - before for before, after in itertools.pairwise(times))
    return generated, first, statistics.median(others)


def run_engine(engine, folder, dtype, threads, pipe):
    """The process of an engine, so that its memory can be measured.

    It receives (ids, count) and sends its times, until it receives None.
    """
    torch.set_num_threads(threads)
    run = engine(folder, dtype)
    while True:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        pipe.send(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)  # resident memory in MB
        request = pipe.recv()
        if request is None:
            return
        pipe.send(time_tokens(run, *request))


def compare_engines(folder, dtype, threads, tokens, rounds):
    """Print tokens per second, time of the first token and memory of each engine.

    The engines take turns. The numbers are medians over the rounds.
    """
    engines = [ours, plain, transformers]
    if missing := [
        name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None
    ]:
        print(f"llama.cpp does not take part: {' and '.join(missing)} not installed")
    else:
        engines.append(llama_cpp)
    spawn, processes = multiprocessing.get_context("spawn"), []
    ids, pipes = huggingface.read_decoder(folder, tensors=False).tokenizer.encode(PROMPT), {}
    for engine in engines:
        pipes[engine], end = spawn.Pipe()
        arguments = (engine, folder, dtype, threads, end)
        processes.append(spawn.Process(target=run_engine, args=arguments, daemon=True))
        processes[-1].start()
    found = {engine: [] for engine in engines}
    memory = {engine: pipe.recv() for engine, pipe in pipes.items()}
    for _ in range(rounds + 1):
        for engine, pipe in pipes.items():
            pipe.send((ids, tokens))
            found[engine].append(pipe.recv())
            memory[engine] = pipe.recv()
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    cores = f"{threads} thread{'s' * (threads > 1)}"
    print(
        f"{Path(folder).name} in {str(dtype).removeprefix('torch.')}, {cores}, "
        f"{len(ids)} tokens of prompt, {tokens} generated:"
    )
    for engine in engines:
        pairs = list(zip(found[engine], found[ours], strict=True))[1:]  # the first round warms up
        generated, own_generated = pairs[0][0][0], pairs[0][1][0]
        first, each = (statistics.median(theirs[i] for theirs, _ in pairs) for i in (1, 2))
        slower = statistics.median(theirs[2] / own[2] for theirs, own in pairs)
        differs = [a != b for a, b in zip(generated, own_generated, strict=True)]
        same = differs.index(True) if True in differs else tokens
        print(
            f"{engine.__name__:12} {1 / each:6.1f} tokens/s, {1 / slower:.2f} of ours; "
            f"first token after {first * 1000:.0f} ms; {memory[engine]:,.0f} MB; "
            f"the first {same} tokens are ours"
        )
