"""A published folder, read by our loaders, computes what transformers computes from it (1e-5).

The weights are random.
"""

import json

import pytest
import torch
import transformers as hf

from nanovlm.checkpoints import huggingface
from nanovlm.data import tokenizer
from nanovlm.models.decoder import Decoder, KVCache
from nanovlm.models.vision_encoder import VisionEncoder

VISION = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=28,
    patch_size=7,
)
DECODER = dict(
    vocab_size=301,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    attn_implementation="eager",
)
PREPROCESSOR = {
    "do_resize": True,
    "size": {"height": 28, "width": 28},
    "resample": 3,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.3, 0.2, 0.1],
}
WORDS = tokenizer.train_tokenizer(
    ["a cat, a catalogue, the category of cats"], 260, ["<|im_start|>", "<|im_end|>"]
)
CHATML = (
    "{% for m in messages %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def shake(model, seed):
    """Random numbers everywhere: a weight left at 0 or 1 could hide that it is not used."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator) * 0.1 + (1.0 if p.dim() == 1 else 0.0)
            )
    return model.float().eval()


def publish(model, folder, **how):
    """Write a model as its owner would: config and weights by transformers; beside them its image
    processor, tokenizer and chat template."""
    model.save_pretrained(folder, **how)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHATML, "eos_token": "<|im_end|>"})
    )
    WORDS.save(folder)
    return folder


def close(ours, theirs):
    assert ours.shape == theirs.shape and (ours - theirs).norm() / theirs.norm() < 1e-5


def clip(**other):
    return shake(hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION | other)), 1)


def siglip(**other):
    return shake(hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION | other)), 2)


def dinov2(**other):
    sizes = {name: size for name, size in VISION.items() if name != "intermediate_size"}
    return shake(hf.Dinov2Model(hf.Dinov2Config(**sizes | {"mlp_ratio": 2} | other)), 3)


@torch.no_grad()
@pytest.mark.parametrize("tile", [28, 42])
@pytest.mark.parametrize("make", [clip, siglip, dinov2])
def test_a_vision_encoder_gives_the_features_of_transformers(make, tile, tmp_path):
    """CLIP's features come before its last layer, as in LLaVA; the others' are the last, normed.
    Larger images take interpolated position embeddings."""
    theirs = make()
    ours = huggingface.read_vision_encoder(publish(theirs, tmp_path), tile=tile).model.vision
    assert len(ours.layers) == (2 if make is clip else 3)
    tiles_NCYX = torch.randn(2, 3, tile, tile)
    larger = {"interpolate_pos_encoding": True} if make is not dinov2 else {}
    out = theirs(tiles_NCYX, output_hidden_states=True, **larger)
    close(
        ours(tiles_NCYX),
        {
            clip: lambda: out.hidden_states[-2][:, 1:],
            siglip: lambda: out.last_hidden_state,
            dinov2: lambda: out.last_hidden_state[:, 1:],
        }[make](),
    )


@torch.no_grad()
@pytest.mark.parametrize("read", [-3, -1, 2])
def test_another_vision_feature_layer(read, tmp_path):
    """It is counted as transformers counts hidden states, without the class token and the norm."""
    theirs = clip(hidden_act="gelu")
    ours = huggingface.read_vision_encoder(
        publish(theirs, tmp_path), vision_feature_layer=read
    ).model.vision
    tiles_NCYX = torch.randn(2, 3, 28, 28)
    close(
        ours(tiles_NCYX), theirs(tiles_NCYX, output_hidden_states=True).hidden_states[read][:, 1:]
    )


@torch.no_grad()
def test_patches_that_do_not_fill_the_tile(tmp_path):
    """SigLIP so400m cuts 27 patches of 14 pixels out of 384; the last 6 pixels are unused."""
    theirs = siglip(image_size=33)
    (publish(theirs, tmp_path) / "preprocessor_config.json").write_text(
        json.dumps(PREPROCESSOR | {"size": {"height": 33, "width": 33}})
    )
    tiles_NCYX = torch.randn(2, 3, 33, 33)
    close(
        huggingface.read_vision_encoder(tmp_path).model.vision(tiles_NCYX),
        theirs(tiles_NCYX).last_hidden_state,
    )


DEFAULT = {"rope_type": "default"}
QWEN_ROPE = DEFAULT | {"rope_theta": 1e6}
# Each differs in its own way: head_dim, a window shorter than the text, tied weights, RoPE scaling,
# biases, norms of queries and keys, layers without RoPE.
DECODERS = {
    "mistral 0.1": (
        hf.MistralForCausalLM,
        hf.MistralConfig,
        dict(sliding_window=7, rope_parameters=DEFAULT | {"rope_theta": 1e4}),
    ),
    "nemo": (
        hf.MistralForCausalLM,
        hf.MistralConfig,
        dict(head_dim=10, sliding_window=None, rope_parameters=DEFAULT | {"rope_theta": 1e6}),
    ),
    "ministral": (
        hf.MinistralForCausalLM,
        hf.MinistralConfig,
        dict(
            head_dim=8,
            sliding_window=5,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            rope_parameters=DEFAULT | {"rope_theta": 1e5},
        ),
    ),
    "llama 2": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig,
        dict(num_key_value_heads=6, rope_parameters=DEFAULT | {"rope_theta": 1e4}),
    ),
    "smollm2": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig,
        dict(tie_word_embeddings=True, rope_parameters=DEFAULT | {"rope_theta": 1e5}),
    ),
    "llama 3": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig,
        dict(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        ),
    ),
    "qwen2.5": (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config,
        # tied, as the small ones are; the window does not count
        dict(tie_word_embeddings=True, sliding_window=7, rope_parameters=QWEN_ROPE),
    ),
    "qwen2 with windows from a layer on": (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config,
        dict(use_sliding_window=True, sliding_window=7, max_window_layers=1),
    ),
    "qwen2.5 for long texts": (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config,
        dict(rope_parameters=QWEN_ROPE | {"rope_type": "yarn", "factor": 4.0}),
    ),
    "qwen3": (
        hf.Qwen3ForCausalLM,
        hf.Qwen3Config,
        dict(head_dim=10, num_key_value_heads=3, rope_parameters=QWEN_ROPE),
    ),
    "qwen3 with windows": (
        hf.Qwen3ForCausalLM,
        hf.Qwen3Config,
        dict(
            head_dim=14,
            use_sliding_window=True,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "smollm3": (
        hf.SmolLM3ForCausalLM,
        hf.SmolLM3Config,
        dict(no_rope_layer_interval=2, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    ),
    "smollm3 with windows where it has no RoPE": (
        hf.SmolLM3ForCausalLM,
        hf.SmolLM3Config,
        dict(
            no_rope_layers=[0, 1, 0],
            use_sliding_window=True,
            sliding_window=6,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "linear": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig,
        dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    ),
    "yarn": (
        hf.MistralForCausalLM,
        hf.MistralConfig,
        dict(
            head_dim=20,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 2.0,
                "beta_slow": 0.2,
            },
        ),
    ),
    "yarn, odd": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig,
        dict(
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e3,
                "factor": 3.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.4,
                "truncate": False,
                "beta_fast": 3.0,
            }
        ),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_gives_the_logits_of_transformers(kind, tmp_path):
    """All tokens at once, and in steps with a KV cache."""
    model, config, own = DECODERS[kind]
    theirs = shake(model(config(**DECODER | own)), 4)
    ours = huggingface.read_decoder(publish(theirs, tmp_path)).model.decoder
    assert (ours.lm_head.weight is ours.embed_tokens.weight) == theirs.config.tie_word_embeddings
    ids_BT = torch.randint(301, (2, 45), generator=torch.Generator().manual_seed(5))
    x_BTD, positions_BT = ours.embed_tokens(ids_BT), torch.arange(45).expand(2, -1)
    wanted_BTV = theirs(ids_BT).logits
    close(ours.lm_head(ours(x_BTD, positions_BT)), wanted_BTV)
    cache, steps = KVCache(ours, 2, 50), (x_BTD.split([31, 12, 1, 1], dim=1))
    hidden = [
        ours(x_BtD, positions_BT[:, cache.length :][:, : x_BtD.shape[1]], cache=cache)
        for x_BtD in steps
    ]
    close(ours.lm_head(torch.cat(hidden, dim=1)), wanted_BTV)


@pytest.mark.parametrize(
    "kind, config",
    [
        ("clip_vision_model", hf.CLIPVisionConfig),
        ("siglip_vision_model", hf.SiglipVisionConfig),
        ("dinov2", hf.Dinov2Config),
        ("llama", hf.LlamaConfig),
        ("mistral", hf.MistralConfig),
        ("qwen2", hf.Qwen2Config),
        ("qwen3", hf.Qwen3Config),
        ("smollm3", hf.SmolLM3Config),
    ],
)
def test_what_a_config_leaves_out_is_what_transformers_assumes(kind, config):
    """The config.json of google/siglip-base-patch16-224 has only the type of its vision encoder."""
    assumed = config()
    for field, value in huggingface.DEFAULTS[kind].items():
        if field in ("sliding_window", "no_rope_layers"):  # transformers fills them in
            theirs = config.__dataclass_fields__[field].default
        elif field == "rope_theta":
            theirs = assumed.rope_parameters[field]
        else:
            theirs = getattr(assumed, field, None)
        derived = {
            "num_key_value_heads": assumed.to_dict().get("num_attention_heads"),
            "head_dim": 128,
        }.get(field)
        assert theirs == (derived if value is None and theirs is not None else value), field


BIG_DECODER = dict(hidden_act="silu", rms_norm_eps=1e-5, max_position_embeddings=32768)
# The published config.json, and the bytes of its weights, two per number.
FULL_SIZE = {
    "mistralai/Mistral-7B-v0.1": (
        dict(BIG_DECODER, model_type="mistral", sliding_window=4096),
        14_483_464_192,
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        dict(
            BIG_DECODER, model_type="mistral", vocab_size=32768, sliding_window=None, rope_theta=1e6
        ),
        14_496_047_104,
    ),
    "mistralai/Mistral-Nemo-Instruct-2407": (
        dict(
            BIG_DECODER,
            model_type="mistral",
            vocab_size=131072,
            hidden_size=5120,
            num_hidden_layers=40,
            head_dim=128,
            sliding_window=None,
            rope_theta=1e6,
        ),
        24_495_564_800,
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": (
        dict(
            BIG_DECODER,
            model_type="llama",
            vocab_size=128256,
            intermediate_size=14336,
            num_key_value_heads=8,
            rope_theta=5e5,
        ),
        16_060_522_496,
    ),
    "lmsys/vicuna-7b-v1.5": (dict(BIG_DECODER, model_type="llama"), 13_476_831_232),
    "Qwen/Qwen2.5-0.5B-Instruct": (
        dict(
            model_type="qwen2",
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            sliding_window=32768,
            max_window_layers=21,
            use_sliding_window=False,
            rope_theta=1e6,
        ),
        988_065_536,
    ),
    "Qwen/Qwen2.5-7B-Instruct": (
        dict(
            model_type="qwen2",
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            rope_theta=1e6,
        ),
        15_231_233_024,
    ),
    "Qwen/Qwen3-8B": (
        dict(
            model_type="qwen3",
            intermediate_size=12288,
            num_hidden_layers=36,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            max_window_layers=36,
            rope_theta=1e6,
            sliding_window=None,
        ),
        16_381_470_720,
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        dict(model_type="smollm3", max_window_layers=28, rope_theta=5e6),
        6_150_197_248,
    ),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_shapes_of_a_full_size_decoder(name):
    """Names and shapes are those of transformers, and the bytes are those published; no weight is
    in memory."""
    config, size = FULL_SIZE[name]
    shapes = huggingface.decoder_shapes(
        huggingface.model_config(config, "text_config", huggingface.DECODER_FAMILIES, name), name
    )
    with torch.device("meta"):
        ours = Decoder(**shapes)
        theirs = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(**config))
    plan = {
        huggingface.published_name(n, huggingface.LLAMA): tensor.shape
        for n, tensor in ours.state_dict().items()
    }
    assert plan == {n: tensor.shape for n, tensor in theirs.state_dict().items()}
    if shapes["tied"]:
        del plan["lm_head.weight"]
    assert sum(2 * shape.numel() for shape in plan.values()) == size


@pytest.mark.parametrize(
    "model, config",
    [
        (
            hf.CLIPVisionModel,
            dict(
                model_type="clip_vision_model",
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
            ),
        ),
        (
            hf.SiglipVisionModel,
            dict(
                model_type="siglip_vision_model",
                hidden_size=1152,
                intermediate_size=4304,
                num_hidden_layers=27,
                num_attention_heads=16,
                image_size=384,
                patch_size=14,
            ),
        ),
        (
            hf.Dinov2Model,
            dict(
                model_type="dinov2",
                hidden_size=1024,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=518,
                patch_size=14,
            ),
        ),
    ],
)
def test_the_shapes_of_a_full_size_vision_encoder(model, config):
    shapes = huggingface.vision_shapes(
        huggingface.DEFAULTS[config["model_type"]] | config, config["image_size"], None, "here"
    )
    table = huggingface.DINOV2 if model is hf.Dinov2Model else huggingface.CLIP
    with torch.device("meta"):
        ours, theirs = VisionEncoder(**shapes), model(model.config_class(**config))
    published = {n: p.numel() for n, p in theirs.state_dict().items()}
    if model is hf.Dinov2Model:  # in memory transformers 5 calls them otherwise than on disk
        assert (
            sum(p.numel() for p in ours.state_dict().values())
            == sum(published.values()) - published["embeddings.mask_token"]
        )
        return
    plan = {huggingface.published_name(n, table): p.numel() for n, p in ours.state_dict().items()}
    assert plan.items() <= published.items()
    assert {n.split(".")[0] for n in published.keys() - plan.keys()} <= {
        "head",
        "encoder",
        "post_layernorm",
    }
