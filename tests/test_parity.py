"""The eye and the brain compute what transformers' published models compute: the same random weights, the same numbers to 1e-5."""
import pytest
import torch
import transformers as hf

from nanovlm.decoder import Decoder
from nanovlm.vision import Vision

BLOCK_NAMES = {  # ours: theirs
    "eye": {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj", "out": "self_attn.out_proj",
            "attention_norm": "layer_norm1", "mlp_norm": "layer_norm2", "up": "mlp.fc1", "down": "mlp.fc2"},
    "brain": {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj", "out": "self_attn.o_proj",
              "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
              "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
}


def shake(model, seed):
    """Random numbers everywhere, norms and biases too: a weight left at 0 or 1 could hide that it is not used."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + (1.0 if p.dim() == 1 else 0.0))
    return model.float().eval()


def copy_blocks(ours, theirs, names):
    for mine, block in zip(ours, theirs, strict=False):  # an eye read at -2 has no last layer
        for here, there in names.items():
            mine.get_submodule(here).load_state_dict(block.get_submodule(there).state_dict())


def close(ours, theirs):
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


@torch.no_grad()
def test_clip_read_at_the_last_layer_but_one_as_llava_does():
    config = hf.CLIPVisionConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7)
    theirs = shake(hf.CLIPVisionModel(config), 1)
    inner = getattr(theirs, "vision_model", theirs)
    ours = Vision(tile=28, patch=7, width=48, layers=3, heads=4, ffn=80, class_token=True, pre_norm=True, post_norm=False, patch_bias=False,
                  activation="quick_gelu", eps=config.layer_norm_eps, read=-2).eval()
    assert len(ours.layers) == 2
    ours.class_token.copy_(inner.embeddings.class_embedding)
    ours.patches.load_state_dict(inner.embeddings.patch_embedding.state_dict())
    ours.positions.copy_(inner.embeddings.position_embedding.weight)
    ours.pre_norm.load_state_dict(inner.pre_layrnorm.state_dict())
    copy_blocks(ours.layers, inner.encoder.layers, BLOCK_NAMES["eye"])
    tiles_NCYX = torch.randn(3, 3, 28, 28)
    close(ours(tiles_NCYX), theirs(tiles_NCYX, output_hidden_states=True).hidden_states[-2][:, 1:])


@torch.no_grad()
def test_siglip_read_at_its_normed_end():
    config = hf.SiglipVisionConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7)
    theirs = shake(hf.SiglipVisionModel(config), 2)
    inner = getattr(theirs, "vision_model", theirs)
    ours = Vision(tile=28, patch=7, width=48, layers=3, heads=4, ffn=80, eps=config.layer_norm_eps).eval()
    ours.patches.load_state_dict(inner.embeddings.patch_embedding.state_dict())
    ours.positions.copy_(inner.embeddings.position_embedding.weight)
    ours.post_norm.load_state_dict(inner.post_layernorm.state_dict())
    copy_blocks(ours.layers, inner.encoder.layers, BLOCK_NAMES["eye"])
    tiles_NCYX = torch.randn(3, 3, 28, 28)
    close(ours(tiles_NCYX), theirs(tiles_NCYX).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_decoder(family):
    common = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
                  max_position_embeddings=64, rms_norm_eps=1e-5, attn_implementation="eager")
    if family == "mistral":  # a head size of its own, and a window shorter than the text
        config = hf.MistralConfig(**common, head_dim=10, sliding_window=7, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
        theirs = shake(hf.MistralForCausalLM(config), 3)
        own = dict(head_size=10, window=7, theta=1e6)
    else:  # SmolLM2 is a Llama with tied embeddings
        config = hf.LlamaConfig(**common, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
        theirs = shake(hf.LlamaForCausalLM(config), 4)
        own = dict(tied=True)
    ours = Decoder(vocabulary=97, width=48, layers=3, heads=6, kv_heads=2, ffn=80, **own).eval()
    ours.embed.load_state_dict(theirs.model.embed_tokens.state_dict())
    ours.head.load_state_dict(theirs.lm_head.state_dict())
    ours.norm.load_state_dict(theirs.model.norm.state_dict())
    copy_blocks(ours.layers, theirs.model.layers, BLOCK_NAMES["brain"])
    assert (ours.head.weight is ours.embed.weight) == (family == "llama")
    ids_BT = torch.randint(97, (2, 19))
    positions_BT = torch.arange(19).expand(2, -1)
    close(ours.head(ours(ours.embed(ids_BT), positions_BT)), theirs(ids_BT).logits)
