"""Back-ends that vary images: the small one, and Stable Diffusion's pipelines in miniature with random weights."""

import functools
import json
import string

import pytest
import torch
import torch.nn.functional as F

from datamodules import ImageDataModule
from leanlight.contracts import ImageBatch, ImageMeta, MissingExtraError, UserError
from lit_modules.dda import Identity, ImageToImage, ImageVariation, Teacher, Tiny, TinyDiffusion, cosine_scores
from lit_modules.dda.diffusion import clip_pixels, shrink
from lit_modules.dda.sampling import sdedit
from lit_modules.frozen import Frozen
from lit_modules.nn import ConvNet, pooled_features

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
CLASSES = ("cat", "dog")
SEEDS = torch.tensor([[1, 2], [3, 4], [2**55, 6]])
SMALLEST = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "add_attention": False,
}


def meta(channels=1, size=8):
    return ImageMeta(
        name="toy",
        source="",
        counts={},
        fingerprint="",
        num_classes=2,
        shape=(channels, size, size),
        classes=CLASSES,
        class_counts=(),
    )


def images(count=3, channels=1, size=8):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 1, 1])


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Frozen(ConvNet(in_channels=1, num_classes=2, width=8, depth=2, image_size=8))


def save(module, path):
    """A checkpoint of a module that was never fitted."""
    state = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "pytorch-lightning_version": "2.6.0",
    }
    module.on_save_checkpoint(state)
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    return save(TinyDiffusion(image_size=8, network=SMALLEST), tmp_path_factory.mktemp("tiny") / "tiny.ckpt")


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory, teacher):
    torch.manual_seed(2)
    module = TinyDiffusion(
        image_size=8,
        network=SMALLEST,
        teacher=Teacher(network=functools.partial(ConvNet, in_channels=1, num_classes=2, width=8, image_size=8)),
    )
    module.condition_on(teacher)
    return save(module, tmp_path_factory.mktemp("tiny") / "conditioned.ckpt")


# ---- identity


def test_identity_gives_each_image_back_k_times_and_scores_1(teacher):
    made = Identity().prepare(meta(), teacher, CPU).vary(images(), LABELS, SEEDS)
    assert torch.equal(made, images()[:, None].expand(-1, 2, -1, -1, -1))
    features = pooled_features(teacher.network, made.flatten(0, 1)).unflatten(0, (3, 2))
    source = pooled_features(teacher.network, images())
    assert torch.equal(cosine_scores(source, features, source.mean(0)), torch.ones(3, 2))


# ---- tiny


@pytest.mark.parametrize("mode", ["sdedit", "embedding"])
def test_variations_depend_on_image_and_seed_alone(conditioned, teacher, mode):
    vary = Tiny(conditioned, mode, steps=3, chunk=4).prepare(meta(), teacher, CPU).vary
    made = vary(images(), LABELS, SEEDS)
    assert made.shape == (3, 2, 1, 8, 8)
    assert made.min() >= 0
    assert made.max() <= 1
    assert torch.equal(made, vary(images(), LABELS, SEEDS))
    for number in range(3):
        alone = vary(images()[number : number + 1], LABELS[number : number + 1], SEEDS[number : number + 1])
        assert torch.equal(alone[0], made[number])
    turned = torch.tensor([2, 0, 1])
    assert torch.equal(vary(images()[turned], LABELS[turned], SEEDS[turned]), made[turned])
    assert not torch.equal(made[:, 0], made[:, 1])
    assert not torch.equal(vary(images(), LABELS, SEEDS + 1), made)
    other = vary(images().flip(0), LABELS, SEEDS)
    assert not torch.equal(other[0], made[0])


def test_sdedit_is_that_of_the_averaged_weights(checkpoint, teacher):
    module = TinyDiffusion.load_from_checkpoint(checkpoint, weights_only=True).eval()
    vary = Tiny(checkpoint, strength=0.4, steps=5).prepare(meta(), teacher, CPU).vary
    noise = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 3)])
    with torch.no_grad():
        expected = sdedit(module.average, module.make_scheduler(), 2 * images(2) - 1, noise, 0.4, 5)
    got = vary(images(2), LABELS[:2], torch.tensor([[1], [3]]))[:, 0]
    torch.testing.assert_close(got, (expected / 2 + 0.5).clamp(0, 1))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A teacher and a diffuser that have seen scikit-learn's digits, and the images."""
    torch.manual_seed(4)
    data = ImageDataModule(dataset="digits")
    data.setup()
    image, label = data.train_split.images.float() / 255, data.train_split.labels
    network = ConvNet(in_channels=1, width=16, depth=2, image_size=8)
    diffuser = TinyDiffusion(image_size=8, network=SMALLEST)
    losses = (
        (network, lambda rows, step: F.cross_entropy(network(image[rows]), label[rows]), 100),
        (
            diffuser.network,
            lambda rows, step: diffuser._loss(diffuser.network, ImageBatch(image[rows], label[rows], rows), step, 0.0),
            200,
        ),
    )
    for module, loss, steps in losses:
        optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
        for step in range(steps):
            optimizer.zero_grad()
            loss(torch.randint(len(image), (48,)), step).backward()
            optimizer.step()
    diffuser.average.load_state_dict(diffuser.network.state_dict())
    path = save(diffuser, tmp_path_factory.mktemp("learnt") / "diffuser.ckpt")
    return Frozen(network), path, image[:100], label[:100]


def judged(learnt, strength, centre=True):
    """Scores and agreement (100, 2) of variations of that strength."""
    teacher, path, image, label = learnt
    seeds = torch.arange(200).view(100, 2)
    made = Tiny(path, strength=strength, steps=20).prepare(meta(), teacher, CPU).vary(image, label, seeds)
    with torch.no_grad():
        known = pooled_features(teacher.network, image)
        features = pooled_features(teacher.network, made.flatten(0, 1))
        agrees = teacher(made.flatten(0, 1)).argmax(1).view(100, 2) == label[:, None]
    return cosine_scores(known, features.unflatten(0, (100, 2)), known.mean(0) if centre else None), agrees


@pytest.mark.slow
def test_scores_and_labels_agree_less_as_strength_rises_and_the_filter_finds_what_agrees(learnt):
    scores, agreement = [], []
    for strength in (0.15, 0.3, 0.5, 0.8):
        score, agrees = judged(learnt, strength)
        scores.append(score.mean().item())
        agreement.append(agrees.float().mean().item())
        kept = score >= 0.6
        if strength >= 0.3:
            assert agrees[kept].float().mean() > agrees[~kept].float().mean() + 0.2
    assert scores == sorted(scores, reverse=True)
    assert agreement == sorted(agreement, reverse=True)
    assert agreement[0] > agreement[-1] + 0.3


def test_guidance_needs_and_uses_the_condition(conditioned, teacher):
    made = [
        Tiny(conditioned, "embedding", steps=3, guidance=guidance)
        .prepare(meta(), teacher, CPU)
        .vary(images(), LABELS, SEEDS)
        for guidance in (0.0, 1.0, 4.0)
    ]
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[1], made[2])


def test_without_guidance_and_condition_every_image_has_the_same_variation(conditioned, teacher):
    vary = Tiny(conditioned, "embedding", steps=3, guidance=0.0).prepare(meta(), teacher, CPU).vary
    made = vary(images(), LABELS, torch.full((3, 1), 7))
    assert torch.equal(made[0], made[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, r"strength: expected a number above 0 and at most 1, got 0.0"),
        ({"strength": 1.5}, r"strength: expected a number above 0 and at most 1, got 1.5"),
        ({"steps": 0}, "steps: expected an integer of at least 1"),
        ({"guidance": -1.0}, "guidance: expected a number from 0, got -1.0"),
        ({"mode": "noise"}, "backend.mode: expected sdedit or embedding, got 'noise'"),
        ({"chunk": 0}, "chunk: expected an integer of at least 1"),
    ],
)
def test_bad_settings_are_one_line_before_anything_is_loaded(options, message):
    with pytest.raises(UserError, match=message):
        Tiny(**options)


def test_a_diffuser_that_is_missing_or_for_other_images_is_one_line(checkpoint, teacher, tmp_path):
    (tmp_path / "other.ckpt").write_bytes(b"no checkpoint")
    for backend, message in (
        (
            Tiny(),
            "backend.checkpoint: expected the checkpoint of a TinyDiffusion, got None; leanlight run dda/pipelines",
        ),
        (Tiny(tmp_path / "other.ckpt"), "backend.checkpoint: expected the checkpoint of a TinyDiffusion"),
        (Tiny(checkpoint, "embedding"), "backend.mode: embedding needs a TinyDiffusion with a teacher"),
        (Tiny(checkpoint, steps=1001), "steps: expected at most 1000"),
    ):
        with pytest.raises(UserError, match=message) as error:
            backend.prepare(meta(), teacher, CPU)
        assert "\n" not in str(error.value)
    with pytest.raises(
        UserError, match=r"backend.checkpoint: expected a TinyDiffusion for images of shape \(3, 8, 8\)"
    ):
        Tiny(checkpoint).prepare(meta(3), teacher, CPU)


def test_a_diffuser_for_another_teacher_is_one_line(conditioned):
    torch.manual_seed(9)
    other = Frozen(ConvNet(in_channels=1, num_classes=2, width=8, depth=2, image_size=8))
    with pytest.raises(UserError, match="teacher: expected the one that the diffusion model was conditioned on"):
        Tiny(conditioned).prepare(meta(), other, CPU)


# ---- Stable Diffusion in miniature


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(3)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    )
    return {"unet": unet, "vae": vae, "scheduler": diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)}


@pytest.fixture(scope="module")
def variation_weights(parts, tmp_path_factory):
    encoder = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=16,
            projection_dim=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )
    pipeline = diffusers.StableDiffusionImageVariationPipeline(
        **parts,
        image_encoder=encoder,
        feature_extractor=transformers.CLIPImageProcessor(),
        safety_checker=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("weights") / "image_variation"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_weights(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = [*letters, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=32)
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=12,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=52,
            eos_token_id=53,
            pad_token_id=53,
        )
    )
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(
        **parts,
        text_encoder=encoder,
        tokenizer=tokenizer,
        feature_extractor=None,
        safety_checker=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "text")
    return folder / "text"


def pipeline_of(name, folder):
    loaded = getattr(diffusers, name).from_pretrained(
        folder, local_files_only=True, safety_checker=None, requires_safety_checker=False
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize("channels", [1, 3])
def test_a_variation_is_that_of_diffusers_own_pipeline(variation_weights, teacher, channels):
    source = images(1, channels)
    vary = ImageVariation(variation_weights, steps=3, chunk=1).prepare(meta(channels), teacher, CPU).vary
    got = vary(source, LABELS[:1], torch.tensor([[5]]))
    colour = source if channels == 3 else source.repeat(1, 3, 1, 1)
    pixels = F.interpolate(colour, (16, 16), mode="bicubic", align_corners=False, antialias=False)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    made = pipeline_of("StableDiffusionImageVariationPipeline", variation_weights)(
        (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1),
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    assert made.shape == (1, 3, 16, 16)
    expected = made.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    if channels == 1:
        expected = (0.299 * expected[:, 0] + 0.587 * expected[:, 1] + 0.114 * expected[:, 2])[:, None]
    torch.testing.assert_close(got[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_image_variations_depend_on_image_and_seed_alone(variation_weights, teacher):
    prepared = ImageVariation(variation_weights, steps=2, chunk=4).prepare(meta(), teacher, CPU)
    made = prepared.vary(images(), LABELS, SEEDS)
    assert made.shape == (3, 2, 1, 8, 8)
    for number in range(3):
        alone = prepared.vary(images()[number : number + 1], LABELS[number : number + 1], SEEDS[number : number + 1])
        assert torch.equal(alone[0], made[number])
    assert not torch.equal(made[:, 0], made[:, 1])


def test_half_precision_gives_the_same_but_for_its_rounding(variation_weights, teacher):
    made = [
        ImageVariation(variation_weights, steps=2, chunk=3, half=half)
        .prepare(meta(), teacher, CPU)
        .vary(images(), LABELS, SEEDS)
        for half in (False, True)
    ]
    assert made[1].dtype == torch.float32
    assert not torch.equal(*made)
    assert (made[0] - made[1]).abs().max() < 0.05


def test_guidance_up_to_1_is_none(variation_weights, teacher):
    """Below 1 the pipeline takes the embedding alone, as at 1."""
    made = [
        ImageVariation(variation_weights, steps=2, guidance=guidance, chunk=3)
        .prepare(meta(), teacher, CPU)
        .vary(images(), LABELS, SEEDS)
        for guidance in (0.0, 1.0, 8.0)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[1], made[2])


def test_the_embedding_is_that_of_clip(variation_weights, teacher):
    embed = ImageVariation(variation_weights, chunk=2).prepare(meta(), teacher, CPU).embed
    encoder = pipeline_of("StableDiffusionImageVariationPipeline", variation_weights).image_encoder
    with torch.no_grad():
        expected = encoder(clip_pixels(images(), 16)).image_embeds
    torch.testing.assert_close(embed(images()), expected, rtol=1e-4, atol=1e-5)


def test_clip_sees_224_pixels_bicubic_without_antialias():
    source = images(2, 3, 32)
    got = clip_pixels(source)
    assert got.shape == (2, 3, 224, 224)
    grey = clip_pixels(torch.full((1, 1, 8, 8), 0.5))
    assert grey[0, :, 100, 100].tolist() == pytest.approx(
        [(0.5 - 0.48145466) / 0.26862954, (0.5 - 0.4578275) / 0.26130258, (0.5 - 0.40821073) / 0.27577711], abs=1e-5
    )
    stripes = torch.zeros(1, 1, 672, 672)
    stripes[..., 1::2] = 1.0  # every third column is taken as it is; antialiasing would blur all into grey
    assert clip_pixels(stripes)[0, 0, 0, 1:5].tolist() == pytest.approx(
        [(value - 0.48145466) / 0.26862954 for value in (0.0, 1.0, 0.0, 1.0)], abs=1e-4
    )


def test_images_shrink_by_means_over_areas():
    made = torch.rand(2, 3, 12, 12, dtype=torch.float16)
    expected = made.float().view(2, 3, 4, 3, 4, 3).mean((3, 5))
    torch.testing.assert_close(shrink(made, (3, 4, 4)), expected)
    assert shrink(torch.ones(1, 3, 8, 8), (1, 2, 2)).tolist() == [[[[1.0, 1.0], [1.0, 1.0]]]]


def test_image_to_image_is_diffusers_own_pipeline_with_a_prompt_a_class(text_weights, teacher):
    backend = ImageToImage(text_weights, strength=0.5, steps=4, size=16, chunk=1)
    got = backend.prepare(meta(3), teacher, CPU).vary(images(2, 3), torch.tensor([1, 0]), SEEDS[:2])
    assert got.shape == (2, 2, 3, 8, 8)
    own = pipeline_of("StableDiffusionImg2ImgPipeline", text_weights)
    start = F.interpolate(images(2, 3)[:1], (16, 16), mode="bicubic", align_corners=False).clamp(0, 1)
    made = own(
        prompt="a photo of a dog",
        image=start,
        strength=0.5,
        num_inference_steps=4,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(2),
        output_type="pt",
    ).images
    torch.testing.assert_close(got[0, 1], shrink(made, (3, 8, 8))[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [ImageVariation, ImageToImage])
def test_missing_weights_are_one_line_that_names_what_is_expected(backend, teacher, tmp_path, parts):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "DDIMPipeline"}')
    (tmp_path / "cut").mkdir()
    name = "StableDiffusionImageVariationPipeline" if backend is ImageVariation else "StableDiffusionImg2ImgPipeline"
    (tmp_path / "cut" / "model_index.json").write_text(json.dumps({"_class_name": name, "unet": ["diffusers", "X"]}))
    for weights in (None, tmp_path / "nothing", tmp_path / "empty", tmp_path / "other", tmp_path / "cut"):
        with pytest.raises(
            UserError, match=r"^backend\.weights: expected the folder of .*nothing is downloaded$"
        ) as error:
            backend(weights).prepare(meta(), teacher, CPU)
        assert "\n" not in str(error.value)


def test_sizes_that_the_pipelines_cannot_make_are_one_line():
    for backend in (ImageVariation, ImageToImage):
        with pytest.raises(UserError, match="size: expected a multiple of 8, got 12"):
            backend(size=12)
    with pytest.raises(UserError, match=r"strength: 0\.01 of 50 steps is not one step"):
        ImageToImage(strength=0.01)


def test_without_transformers_the_extra_is_named(variation_weights, teacher, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"transformers.*leanlight\[diffusion\]"):
        ImageVariation(variation_weights).prepare(meta(), teacher, CPU)
