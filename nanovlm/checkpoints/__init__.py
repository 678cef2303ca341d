"""Checkpoints: models on disk. Read in this order:

checkpoint.py    save and load a model with its tokenizer, image config and chat template
random_init.py   a new model with random weights
huggingface.py   the vision encoder or the decoder of a Hugging Face folder
stitch.py        a vision encoder and a decoder become one model with a new projector
llava.py         import and export of whole models as LLaVA folders
idefics3.py      the same for Idefics3 and SmolVLM, hf_nanovlm.py for Hugging Face's nanoVLM
lora.py, peft.py LoRA beside a model's weights, and the adapters of peft
sharded.py       checkpoints that every rank writes its own rows of (FSDP)
"""
