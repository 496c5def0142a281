"""Backbones: tiny ones made on the spot, the same from a folder, and folders that are none."""

import json
import shutil

import pytest
import torch
from squares import WORDS, labelled

from leanlight.contracts import UserError
from lit_modules.falcon_eye import PretrainedVLM, Prompt, SafetyEncoder, TinyVLM


@pytest.fixture(scope="module")
def saved(backbone, tmp_path_factory):
    """The tiny model as ``save_pretrained`` writes it."""
    folder = tmp_path_factory.mktemp("model")
    backbone.model.save_pretrained(folder)
    backbone.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(saved, tmp_path / "model")


def logits(backbone):
    encoder = SafetyEncoder(backbone)
    batch = encoder.encode([labelled(0), labelled(1, image=None)], torch.arange(2), targets=False)
    with torch.no_grad():
        return backbone.model(**encoder.batch_inputs(batch)).logits


def refused(path):
    with pytest.raises(UserError) as error:
        PretrainedVLM(str(path)).build()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_tiny_model_is_that_of_transformers(backbone):
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    assert type(backbone.model) is Qwen2_5_VLForConditionalGeneration
    assert type(backbone.processor) is Qwen2_5_VLProcessor
    assert not backbone.model.training
    assert backbone.takes_token_types
    text = backbone.model.config.text_config
    assert text.vocab_size == len(backbone.tokenizer) <= 700
    assert text.rope_parameters["mrope_section"] == [2, 3, 3]
    rest = sum(p.numel() for p in backbone.model.parameters()) - 2 * 64 * text.vocab_size
    assert rest == 225_888 - 2 * 64 * 531  # published for this size with 531 tokens
    tokens = backbone.tokenizer.convert_ids_to_tokens([backbone.image_token_id, backbone.end_id, backbone.pad_id])
    assert tokens == ["<|image_pad|>", "<|im_end|>", "<|endoftext|>"]


def test_weights_are_a_function_of_the_seed_and_random_states_stay(backbone):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    again = TinyVLM(seed=1).build(tokenizer=backbone.tokenizer_json)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(logits(again), logits(backbone))
    other = TinyVLM(seed=2).build(tokenizer=backbone.tokenizer_json)
    assert not torch.equal(other.model.lm_head.weight, backbone.model.lm_head.weight)


def test_a_tokenizer_is_rebuilt_from_its_text(backbone):
    again = TinyVLM(seed=1).build(tokenizer=json.loads(json.dumps(backbone.tokenizer_json)))
    for text in (*WORDS, "Ünïcode \U0001f600", "<|im_end|>"):
        assert again.tokenizer(text)["input_ids"] == backbone.tokenizer(text)["input_ids"]
        assert again.tokenizer.decode(again.tokenizer(text)["input_ids"]) == text


def test_the_digest_tells_bases_apart(backbone):
    backbone.tokenizer(["a", "b c"], padding=True)  # leaves its padding in the tokenizer
    json_text = backbone.tokenizer_json
    digests = [
        TinyVLM(seed=1).build(tokenizer=json_text).digest,
        TinyVLM(seed=2).build(tokenizer=json_text).digest,
        TinyVLM(seed=1, layers=1).build(tokenizer=json_text).digest,
        TinyVLM(seed=1).build(WORDS).digest,
    ]
    assert digests[0] == backbone.digest
    assert len(set(digests)) == 4


def test_a_tiny_model_without_texts_is_refused():
    with pytest.raises(UserError, match="a tiny model needs texts to train its tokenizer on"):
        TinyVLM().build()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 0}, "layers: expected an integer of at least 1, got 0"),
        ({"hidden": 60}, "hidden: expected a multiple of 4 for each of 4 heads, at least 8, got 60"),
        ({"vision_hidden": 20}, "vision_hidden: expected a multiple of 4 for each of 2 heads"),
        ({"kv_heads": 3}, "kv_heads: expected a divisor of heads 4, got 3"),
        ({"vocab_size": 263}, "vocab_size: expected at least 264, got 263"),
    ],
)
def test_sizes_that_make_no_model_are_named(sizes, message):
    with pytest.raises(UserError, match=message):
        TinyVLM(**sizes)


@pytest.mark.parametrize(
    "sizes", [{"hidden": 32}, {"hidden": 96, "vocab_size": 264}, {"vision_layers": 3, "layers": 1}]
)
def test_other_sizes_make_a_model_that_runs(sizes):
    assert logits(TinyVLM(seed=0, **sizes).build(WORDS)).isfinite().all()


def test_a_folder_gives_the_model_that_was_saved(backbone, saved):
    loaded = PretrainedVLM(str(saved)).build()
    assert type(loaded.model) is type(backbone.model)
    assert type(loaded.processor) is type(backbone.processor)
    assert loaded.name == saved.name
    assert not loaded.model.training
    torch.testing.assert_close(logits(loaded), logits(backbone), rtol=0, atol=0)
    half = PretrainedVLM(str(saved), dtype="bfloat16", attention="eager").build()
    assert half.model.dtype is torch.bfloat16
    assert half.model.config._attn_implementation == "eager"
    assert half.digest == loaded.digest


def test_the_digest_of_a_folder_follows_its_weights_alone(folder):
    from safetensors.torch import load_file, save_file

    before = PretrainedVLM(str(folder)).build().digest
    (folder / "README.md").write_text("new")
    assert PretrainedVLM(str(folder)).build().digest == before
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert PretrainedVLM(str(folder)).build().digest != before


def test_a_qwen2_vl_loads_through_the_same_door(backbone, tmp_path):
    import transformers

    config = backbone.model.config
    text = {key: value for key, value in config.text_config.to_dict().items() if key not in ("model_type", "dtype")}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    ids = {name: getattr(config, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id")}
    model = transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    )
    old = backbone.processor
    model.save_pretrained(tmp_path)
    transformers.Qwen2VLProcessor(
        old.image_processor, old.tokenizer, old.video_processor, old.chat_template
    ).save_pretrained(tmp_path)
    loaded = PretrainedVLM(str(tmp_path)).build()
    assert type(loaded.model).__name__ == "Qwen2VLForConditionalGeneration"
    assert logits(loaded).isfinite().all()


def test_a_qwen3_vl_with_patches_of_another_size_does_too(backbone, tmp_path):
    import transformers

    config, old = backbone.model.config, backbone.processor
    text = {
        "vocab_size": len(backbone.tokenizer), "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
        "patch_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 256,
    }  # fmt: skip
    ids = {
        name: getattr(config, name)
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    ).save_pretrained(tmp_path)
    transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(patch_size=16),
        old.tokenizer,
        transformers.Qwen3VLVideoProcessor(),
        old.chat_template,
    ).save_pretrained(tmp_path)
    loaded = PretrainedVLM(str(tmp_path)).build()
    batch = SafetyEncoder(loaded).encode([labelled(0), labelled(1, image=None)], torch.arange(2), targets=False)
    assert [tuple(patches.shape) for patches in batch.pixel_values] == [(16, 1536), (0, 1536)]
    assert logits(loaded).isfinite().all()


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["config.json"], "config.json"),
        (["tokenizer.json", "model.safetensors"], "tokenizer.json, model.safetensors"),
        (["processor_config.json"], "preprocessor_config.json"),
    ],
)
def test_files_that_a_folder_lacks_are_named(folder, files, named):
    for file in files:
        (folder / file).unlink()
    assert refused(folder) == f"path: expected the files of a vision-language model in {folder}, it lacks {named}"


def test_shards_that_an_index_promises_are_named(folder):
    shutil.move(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert refused(folder).endswith("it lacks model-00002-of-00002.safetensors")


def test_weights_that_lack_are_named(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks the weights lm_head.weight" in refused(folder)


def test_broken_files_are_one_line(folder):
    (folder / "config.json").write_text("{")
    assert "cannot be loaded" in refused(folder)


def test_a_path_that_is_neither_a_folder_nor_a_name_is_refused(tmp_path):
    message = refused(tmp_path / "nowhere")
    assert message.startswith("path: expected a folder with a vision-language model or its name on the hub, got ")


def test_a_name_that_the_hub_does_not_give_is_one_line(monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert "there is no folder some/model, and the hub gives no model of that name (OSError: no route)" in refused(
        "some/model"
    )


def test_a_name_on_the_hub_is_fetched_without_pickles(saved, monkeypatch):
    import huggingface_hub

    asked = {}

    def fetched(name, **settings):
        asked.update(settings, name=name)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert PretrainedVLM("some/model", revision="v1").build().name == "some/model"
    assert (asked["name"], asked["revision"]) == ("some/model", "v1")
    assert not any(pattern in ("*", "*.bin", "*.pt") for pattern in asked["allow_patterns"])


def test_a_processor_whose_pictures_have_no_grid_is_not_supported(folder, backbone):
    from transformers import CLIPImageProcessor, LlavaProcessor

    for file in ("processor_config.json", "chat_template.jinja"):
        (folder / file).unlink()
    LlavaProcessor(CLIPImageProcessor(), backbone.tokenizer, patch_size=14, chat_template="x").save_pretrained(folder)
    message = refused(folder)
    assert "LlavaProcessor" in message
    assert "is not supported: expected one whose pictures come as pixel_values and image_grid_thw" in message


def test_a_tokenizer_without_the_image_token_is_refused(folder):
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] != "<|image_pad|>"]
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    assert "expected an image token in the tokenizer" in refused(folder)


def test_a_folder_without_a_chat_template_is_refused(folder):
    (folder / "chat_template.jinja").unlink()
    assert "expected a chat template" in refused(folder)


def test_the_wording_trains_a_tokenizer_that_takes_few_tokens(backbone):
    bytes_alone = TinyVLM(seed=0, vocab_size=264).build(Prompt().texts())
    question = Prompt().text(labelled(0))
    assert len(backbone.tokenizer(question)["input_ids"]) < 0.4 * len(bytes_alone.tokenizer(question)["input_ids"])
