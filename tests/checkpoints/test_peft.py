"""LoRA beside peft: the same losses, adapters that either of the two writes and the other loads."""

import json
import re

import peft
import pytest
import torch
import transformers as hf
from conftest import make_vlm
from safetensors.torch import load_file, save_file

import prepare
from nanovlm import IGNORE_INDEX, IMAGE_TOKEN_ID, UserError
from nanovlm.checkpoints.checkpoint import load_checkpoint
from nanovlm.checkpoints.huggingface import published_name
from nanovlm.checkpoints.lora import add_lora
from nanovlm.checkpoints.peft import LAYOUTS, export_adapter, merge_adapter, read_adapter_config
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.training.recipes import freeze_parts

# peft 0.21.2 asks for an attribute that transformers 5.24 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
PATCHES, IMAGE_ID = 4, 299
VISION = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    image_size=28,
    patch_size=14,
)
DECODER = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA that transformers has written."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**DECODER),
        image_token_index=IMAGE_ID,
        image_seq_length=PATCHES,
    )
    theirs = hf.LlavaForConditionalGeneration(config).float()
    theirs.save_pretrained(folder)
    theirs_text = hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER))
    theirs_text.model.load_state_dict(theirs.model.language_model.state_dict())
    theirs_text.lm_head.load_state_dict(theirs.lm_head.state_dict())
    theirs_text.save_pretrained(folder / "decoder")
    square = {"height": 28, "width": 28}
    preprocessor = dict(size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    train_tokenizer(["a"], 256, ["<s>", "</s>", "<image>"]).save(folder)
    return folder


def with_lora(folder, target="decoder", freeze=("vision",), rank=3, alpha=9):
    """Returns the Checkpoint that train.py makes of the LLaVA: LoRA, its base frozen."""
    checkpoint = load_checkpoint(folder, template="plain")
    lora = dict(rank=rank, alpha=alpha, target=target)
    parts = [part for part in ("vision", "projector", "decoder") if part not in freeze]
    torch.manual_seed(1)
    add_lora(checkpoint.model.train(), **lora)
    freeze_parts(checkpoint.model, parts, lora)
    return checkpoint._replace(lora=lora | {"trained": parts})


def batches(ids_T, tiles_NCYX):
    """The same sequence, an image first, as transformers takes it and as we do; the later half has
    labels."""
    theirs_T = torch.cat([torch.full((PATCHES,), IMAGE_ID), ids_T])
    labels_T = theirs_T.clone()
    labels_T[: len(theirs_T) // 2] = IGNORE_INDEX
    pixels = (tiles_NCYX / 255 - 0.5) / 0.5
    theirs = dict(input_ids=theirs_T[None], labels=labels_T[None], pixel_values=pixels)
    ours_T = torch.cat([torch.full((PATCHES,), IMAGE_TOKEN_ID), ids_T])
    targets_T = torch.cat([labels_T[1:], torch.tensor([IGNORE_INDEX])])
    positions_T = torch.arange(len(ours_T))
    ours = dict(ids_BT=ours_T[None], targets_BT=targets_T[None], positions_BT=positions_T[None])
    ours |= dict(documents_BT=torch.zeros_like(ours_T)[None], tiles_NCYX=tiles_NCYX)
    return theirs, ours


def random_batches(seed):
    g = torch.Generator().manual_seed(seed)
    ids_T = torch.randint(259, (11 + seed,), generator=g)
    return batches(ids_T, torch.randint(256, (1, 3, 28, 28), generator=g, dtype=torch.uint8))


def our_loss(model, batch):
    return model(**batch) / (batch["targets_BT"] != IGNORE_INDEX).sum()


def perturb(model):
    """B starts at zero: give it, and all else that trains, other values."""
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)


def their_model(folder, adapter, **options):
    theirs = hf.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(theirs, adapter, **options)


def test_losses_are_those_of_a_plain_loop_around_peft(folder, tmp_path):
    """Both start from the adapter that we write: LoRA of the decoder, and the whole projector."""
    ours = with_lora(folder)
    export_adapter(ours, str(folder), tmp_path / "adapter")
    theirs = their_model(folder, tmp_path / "adapter", is_trainable=True).train()
    optimizers, losses = [], []
    for model in (theirs, ours.model):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers.append(torch.optim.AdamW(trained, lr=1e-2))
    for seed in range(6):
        their_batch, our_batch = random_batches(seed % 2)
        losses.append((theirs(**their_batch).loss, our_loss(ours.model, our_batch)))
        for loss, optimizer in zip(losses[-1], optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for their_loss, loss in losses:
        assert loss.item() == pytest.approx(their_loss.item(), abs=1e-4)
    assert losses[4][1] < losses[0][1] - 0.1  # the same batch


@pytest.mark.parametrize("target", ["decoder", "vision", "both"])
@torch.no_grad()
def test_peft_loads_our_adapter_of_a_llava_with_equal_logits(folder, tmp_path, target):
    ours = with_lora(folder, target, freeze=("vision", "decoder")[: 1 + (target == "vision")])
    if target != "decoder":
        ours = ours._replace(lora=ours.lora | {"trained": ["vision", *ours.lora["trained"]]})
        freeze_parts(ours.model, ours.lora["trained"], ours.lora)
    perturb(ours.model)
    export_adapter(ours, str(folder), tmp_path / "adapter")
    theirs = their_model(folder, tmp_path / "adapter").eval()
    their_batch, our_batch = random_batches(7)
    hidden_BTD = ours.model.decoder(
        ours.model.embed(our_batch["ids_BT"], our_batch["tiles_NCYX"]), our_batch["positions_BT"]
    )
    logits_BTV = ours.model.decoder.lm_head(hidden_BTD)
    torch.testing.assert_close(logits_BTV, theirs(**their_batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llava", "llava_next", "idefics3", "smolvlm"])
def test_the_layers_of_a_whole_model_have_the_names_of_transformers(model_type):
    vision = dict(num_hidden_layers=2, hidden_size=12, num_attention_heads=3)
    kinds = {
        "llava": (hf.LlavaConfig, hf.CLIPVisionConfig),
        "llava_next": (hf.LlavaNextConfig, hf.CLIPVisionConfig),
        "idefics3": (hf.Idefics3Config, hf.Idefics3VisionConfig),
        "smolvlm": (hf.SmolVLMConfig, hf.SmolVLMVisionConfig),
    }
    whole, encoder = kinds[model_type]
    config = whole(vision_config=encoder(**vision), text_config=hf.LlamaConfig(**DECODER))
    with torch.device("meta"):
        theirs = hf.AutoModelForImageTextToText.from_config(config)
    ours = make_vlm(decoder=dict(layers=2), projector_mlp=model_type not in ("idefics3", "smolvlm"))
    count = 0
    for name, layer in ours.named_modules():
        part, _, rest = name.partition(".")
        if isinstance(layer, torch.nn.Linear) and rest != "lm_head":
            where, table = LAYOUTS[model_type][part]
            published = where + published_name(f"{rest}.weight", table)
            assert isinstance(theirs.get_parameter(published), torch.nn.Parameter)
            count += 1
    assert count == 2 * 6 + 2 * 7 + 1 + (ours.projector.linear_2 is not None)


@torch.no_grad()
def decoder_logits(model, ids_BT):
    hidden_BTD = model.decoder(model.decoder.embed_tokens(ids_BT), torch.arange(5)[None])
    return model.decoder.lm_head(hidden_BTD)


@torch.no_grad()
def test_peft_loads_our_adapter_onto_the_decoder_alone(folder, tmp_path):
    """Its names are those of a language model; the projector is not in it."""
    ours, ids_BT = with_lora(folder), torch.tensor([[5, 4, 3, 2, 1]])
    perturb(ours.model)
    export_adapter(ours, str(folder / "decoder"), tmp_path / "adapter")
    names = load_file(tmp_path / "adapter/adapter_model.safetensors").keys()
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert first in names and len(names) == 2 * 2 * 7
    theirs = hf.LlamaForCausalLM.from_pretrained(folder / "decoder", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    ours = decoder_logits(ours.model, ids_BT)
    torch.testing.assert_close(ours, theirs(ids_BT).logits, rtol=1e-4, atol=1e-4)


def write_adapter(folder, out, **options):
    """An adapter of the decoder that peft writes. Returns the logits of its model."""
    theirs = hf.LlamaForCausalLM.from_pretrained(folder / "decoder", dtype=torch.float32)
    options = dict(r=5, lora_alpha=7, target_modules=["q_proj", "v_proj", "up_proj"]) | options
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    perturb(theirs)
    theirs.save_pretrained(out)
    with torch.no_grad():
        return theirs(torch.tensor([[5, 4, 3, 2, 1]])).logits


@pytest.mark.parametrize("options", [{}, dict(layers_to_transform=[1]), dict(lora_dropout=0.5)])
def test_we_load_an_adapter_that_peft_has_written(folder, tmp_path, options):
    logits_BTV = write_adapter(folder, tmp_path / "adapter", **options)
    ours = load_checkpoint(folder, template="plain")
    before = decoder_logits(ours.model, torch.tensor([[5, 4, 3, 2, 1]]))
    merge_adapter(ours, tmp_path / "adapter")
    after = decoder_logits(ours.model, torch.tensor([[5, 4, 3, 2, 1]]))
    assert (before - after).abs().max() > 0.01
    torch.testing.assert_close(after, logits_BTV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("use_dora", True),
        ("use_rslora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("init_lora_weights", "pissa"),
        ("fan_in_fan_out", True),
        ("trainable_token_indices", [1]),
        ("an_option_of_tomorrow", 1),
    ],
)
def test_an_option_that_is_not_computed_is_refused(tmp_path, field, value):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(dict(peft_type="LORA", r=2, lora_alpha=4) | {field: value}))
    with pytest.raises(
        UserError, match=re.escape(f"{field} {value!r} is not computed here; merge")
    ):
        read_adapter_config(path)


def test_every_default_of_pefts_config_is_plain_lora(tmp_path):
    peft.LoraConfig(r=6, lora_alpha=5).save_pretrained(tmp_path)
    assert read_adapter_config(tmp_path / "adapter_config.json") == (6, 5)


def test_an_adapter_of_another_model_is_refused(folder, tmp_path):
    write_adapter(folder, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors, ours = load_file(path), load_checkpoint(folder, template="plain")
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for changed, message in [
        (tensors | {first: torch.ones(5, 31)}, r"q_proj.lora_A.weight in .* is \[5, 31\], .*5, 32"),
        ({n: t for n, t in tensors.items() if n != first}, "q_proj.lora_A.weight is missing"),
        (tensors | {first.replace("0", "9"): torch.ones(5, 32)}, "layers.9.* is not used"),
        (tensors | {first: tensors[first] * torch.nan}, "holds a NaN or infinite value"),
    ]:
        save_file(changed, path)
        with pytest.raises(UserError, match=message):
            merge_adapter(ours, tmp_path / "adapter")


def test_what_an_adapter_cannot_hold_is_refused(folder, tmp_path):
    whole = with_lora(folder, "decoder", freeze=())
    with pytest.raises(UserError, match="cannot hold vision.class_token, which has trained whole"):
        export_adapter(whole, str(folder), tmp_path / "out")
    only_vision = with_lora(folder, "vision", freeze=("decoder",))
    with pytest.raises(UserError, match="decoder has no part with LoRA; it is in the vision"):
        export_adapter(only_vision, str(folder / "decoder"), tmp_path / "out")
    for command, arguments in [
        (prepare.merge_lora, dict(model="no/model", out=str(tmp_path / "out"))),
        (prepare.export_lora, dict(model="no/model", base=str(folder), out=str(tmp_path / "out"))),
    ]:
        with pytest.raises(UserError, match="no such model: no/model"):
            command(**arguments)
    assert not (tmp_path / "out").exists()
