"""Checkpoints of others: read with equal results, written back, and turned between directions."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models

from mamba2_apps import cli, layouts
from mamba2_apps.backbone import Backbone, BackboneConfig
from mamba2_apps.language import LanguageModel, end_tokens, load_tokenizer, text_pieces

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 8, "state_size": 8,
    "chunk_size": 16, "vocab_size": 40,
}  # fmt: skip
IDS = torch.randint(40, (2, 21), generator=torch.Generator().manual_seed(1))


def theirs(kind="Mamba2ForCausalLM", **options):
    torch.manual_seed(0)
    config = transformers.Mamba2Config(**{"n_groups": 2, **SIZES, **options})
    return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"n_groups": 1, "use_bias": True, "tie_word_embeddings": True}, {"use_conv_bias": False}],
    ids=["plain", "bias, tied", "no bias"],
)
def test_equals_a_hugging_face_language_model(tmp_path, options):
    model = theirs(**options)
    model.save_pretrained(tmp_path)
    ours = LanguageModel.from_pretrained(tmp_path)
    assert ours.tied == options.get("tie_word_embeddings", False)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), model(IDS).logits, rtol=1e-4, atol=1e-4)
    for name, tensor in ours.backbone.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[f"backbone.{name}"]), name


def test_equals_a_sharded_hugging_face_backbone(tmp_path):
    model = theirs("Mamba2Model")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = Backbone.from_pretrained(tmp_path)
    with torch.no_grad():
        hidden = ours(model.embeddings(IDS))
        torch.testing.assert_close(hidden, model(IDS).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_generates_token_by_token_what_transformers_generates(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path)
    ours = LanguageModel.from_pretrained(tmp_path)
    for length in (1, 2, 21):  # shorter and longer than the convolution's window
        prompt = IDS[:, :length]
        expected = model.generate(
            prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        found = torch.stack(list(ours.generate(prompt, 12)), 1)
        assert torch.equal(found, expected[:, length:])
        again = torch.cat([prompt, found[:, :-1]], 1)
        with torch.no_grad():
            assert torch.equal(ours(again)[:, length - 1 :].argmax(-1), found)


def test_texts_end_where_transformers_ends_them(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path)
    ours = LanguageModel.from_pretrained(tmp_path)
    free = torch.stack(list(ours.generate(IDS, 12)), 1)
    ends = [int(free[0, 3]), int(free[1, 7])]
    assert not set(free[0, :3].tolist() + free[1, :7].tolist()) & set(ends)
    for row, end in enumerate(ends):
        assert torch.equal(
            torch.stack(list(ours.generate(IDS[row : row + 1], 12, stop=[end])), 1),
            model.generate(
                IDS[row : row + 1],
                attention_mask=torch.ones(1, 21),  # else its padding token's number is padding
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=end,
            )[:, 21:],
        )
    both = torch.stack(list(ours.generate(IDS, 12, stop=ends)), 1)
    assert both.shape == (2, 8)  # as long as the longer one
    assert torch.equal(both[1], free[1, :8])
    assert both[0].tolist() == free[0, :3].tolist() + [ends[0]] * 5


def test_the_end_of_a_text_is_named_by_the_checkpoint(tmp_path):
    folder = folder_with_tokenizer(tmp_path)
    tokenizer = load_tokenizer(folder)
    assert end_tokens(folder, tokenizer) == [2]  # as generation_config.json says
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert end_tokens(folder, tokenizer) == [3, 4]
    (folder / "generation_config.json").unlink()
    assert end_tokens(folder, tokenizer) == [2]  # as config.json says
    (folder / "config.json").write_text("{}")  # as state-spaces' say nothing
    assert end_tokens(folder, tokenizer) == []
    for text in ('"?"', '{"content": "?"}'):
        (folder / "tokenizer_config.json").write_text(f'{{"eos_token": {text}}}')
        assert end_tokens(folder, tokenizer) == [36]


def test_a_prompt_generates_the_same_in_a_padded_batch(tmp_path):
    theirs().save_pretrained(tmp_path)
    ours = LanguageModel.from_pretrained(tmp_path)
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[1, :9] = False
    both = torch.stack(list(ours.generate(IDS, 8, mask=mask)), 1)
    alone = torch.stack(list(ours.generate(IDS[1:, 9:], 8)), 1)
    assert torch.equal(both[1:], alone)


def test_samples_follow_the_generator_and_the_limits(tmp_path):
    ours = LanguageModel(BackboneConfig(32, 1, d_state=8, headdim=8), 30, padded_vocab_size=40)
    with torch.no_grad():
        ours.embedding.weight[30:] = 100  # rows that are no tokens

    def sample(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        tokens = ours.generate(IDS % 30, 20, generator=generator, **options)
        return torch.stack(list(tokens), 1)

    first = sample(0, temperature=1.0)
    assert torch.equal(first, sample(0, temperature=1.0))
    assert not torch.equal(first, sample(1, temperature=1.0))
    assert first.max() < 30
    greedy = torch.stack(list(ours.generate(IDS % 30, 20)), 1)
    assert torch.equal(sample(3, temperature=2.0, top_k=1), greedy)
    assert torch.equal(sample(3, temperature=2.0, top_p=1e-6), greedy)
    for options in ({"temperature": -1}, {"top_k": 0}, {"top_p": 1.5}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
            ours.generate(IDS, **{"max_new_tokens": 1, **options})


@pytest.mark.parametrize("tied", [True, False])
def test_goes_back_to_hugging_face(tmp_path, tied):
    torch.manual_seed(0)
    config = BackboneConfig(32, 2, d_state=8, headdim=8, dt_limit=(0.001, 0.2), norm_eps=1e-3)
    ours = LanguageModel(config, 40, tie_embeddings=tied).eval()
    ours.save_hugging_face(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, ours(IDS), rtol=1e-4, atol=1e-4)
    # No token of ours means an end, or padding, to transformers.
    assert model.config.eos_token_id is None
    assert model.config.pad_token_id is None
    again = LanguageModel.from_pretrained(tmp_path)
    assert again.backbone.config == config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_what_hugging_face_has_not_is_named(tmp_path):
    config = BackboneConfig(32, 1, d_state=8, headdim=8, d_intermediate=16)
    with pytest.raises(ValueError, match="d_intermediate is 16; the Hugging Face layout has 0"):
        LanguageModel(config, 40).save_hugging_face(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_language_model_comes_back_bit_by_bit(tmp_path):
    for tied in (True, False):
        config = BackboneConfig(32, 2, d_state=8, headdim=8)
        one = LanguageModel(config, 37, padded_vocab_size=40, tie_embeddings=tied).bfloat16()
        one.save_pretrained(tmp_path)
        again = LanguageModel.from_pretrained(tmp_path)
        assert (again.tied, again.vocab_size) == (tied, 37)
        for name, tensor in one.state_dict().items():
            assert again.state_dict()[name].dtype == tensor.dtype
            assert torch.equal(again.state_dict()[name], tensor)
        backbone = Backbone.from_pretrained(tmp_path)
        assert torch.equal(backbone.norm_f.weight, one.backbone.norm_f.weight)


def test_another_dtype_leaves_the_decays_alone(tmp_path):
    LanguageModel(BackboneConfig(32, 2, d_state=8, headdim=8), 40).save_pretrained(tmp_path)
    stored, ids = LanguageModel.from_pretrained(tmp_path), torch.arange(12)[None]
    for cls in (LanguageModel, Backbone):
        half = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
        for name, tensor in half.state_dict().items():
            exact = name.rpartition(".")[2] in ("A_log", "D", "dt_bias")
            assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), name
    half = LanguageModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.tied
    assert half.head.proj.weight is half.embedding.weight
    with torch.no_grad():
        expected = stored(ids)
        assert (half(ids).float() - expected).norm() < 2e-2 * expected.norm()


HYBRID = {
    "d_model": 32, "n_layer": 2, "d_intermediate": 100, "vocab_size": 37,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8, "chunk_size": 256},
    "attn_layer_idx": [1],
    "attn_cfg": {"causal": True, "num_heads": 4, "head_dim": 16, "d_conv": 4, "rotary_emb_dim": 8,
                 "qkv_proj_bias": False, "out_proj_bias": False, "mlp_dim": 20},
    "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
    "pad_vocab_size_multiple": 16, "tie_embeddings": True,
}  # fmt: skip


def state_spaces_folder(path, content=HYBRID):
    """A folder as mamba_ssm's save_pretrained writes it, with the shapes of its modules."""
    torch.manual_seed(0)
    shapes = {"backbone.embedding.weight": (48, 32), "backbone.norm_f.weight": (32,)}
    for layer in "01":
        shapes |= {
            f"backbone.layers.{layer}.{name}": shape
            for name, shape in {
                "norm.weight": (32,), "norm2.weight": (32,),
                "mlp.fc1.weight": (256, 32), "mlp.fc2.weight": (32, 128),
            }.items()
        }  # fmt: skip
    mixers = {
        "0": {"in_proj.weight": (2 * 64 + 2 * 8 + 8, 32), "conv1d.weight": (80, 1, 4),
              "conv1d.bias": (80,), "dt_bias": (8,), "A_log": (8,), "D": (8,),
              "norm.weight": (64,), "out_proj.weight": (32, 64)},
        "1": {"in_proj.weight": (3 * 64 + 256, 32), "conv1d.weight": (192, 1, 4),
              "conv1d.bias": (192,), "out_proj.weight": (32, 64 + 128)},
    }  # fmt: skip
    for layer, parts in mixers.items():
        shapes |= {f"backbone.layers.{layer}.mixer.{name}": s for name, s in parts.items()}
    tensors = {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    path.mkdir(exist_ok=True)
    torch.save(tensors, path / "pytorch_model.bin")
    (path / "config.json").write_text(json.dumps(content))
    return tensors


def test_reads_a_state_spaces_hybrid(tmp_path):
    tensors = state_spaces_folder(tmp_path)
    ours = LanguageModel.from_pretrained(tmp_path)
    config = ours.backbone.config
    assert (config.d_intermediate, config.d_state, config.attn_layer_idx) == (128, 8, (1,))
    assert config.attn_cfg["mlp_dim"] == 256
    assert (ours.vocab_size, ours.tied) == (37, True)
    for name, tensor in ours.backbone.state_dict().items():
        assert torch.equal(tensor, tensors[f"backbone.{name}"]), name
    whole = ours(IDS % 37)
    hidden, state = ours.backbone(ours.embedding(IDS[:, :10] % 37), return_state=True)
    rest = ours.backbone(ours.embedding(IDS[:, 10:] % 37), state=state)
    torch.testing.assert_close(ours.head(torch.cat([hidden, rest], 1)), whole)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"ssm_cfg": {"layer": "Mamba1"}}, "its layers are Mamba1, expected Mamba2"),
        ({"rms_norm": False}, "rms_norm is false"),
        ({"rope": 1}, "unknown settings rope"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_stat": 8}}, "d_stat"),
        ({"n_layer": 3}, r"missing: layers\.2\.mixer"),
        ({"d_intermediate": 200}, r"layers\.0\.mlp\.fc1\.weight: shape \(256, 32\), expected"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, sentence):
    state_spaces_folder(tmp_path, {**HYBRID, **change})
    with pytest.raises(ValueError, match=sentence):
        Backbone.from_pretrained(tmp_path)


def test_unknown_weights_and_code_in_a_pickle_are_refused(tmp_path):
    tensors = state_spaces_folder(tmp_path)
    torch.save(
        {**tensors, "backbone.layers.0.extra": torch.ones(1)}, tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(ValueError, match=r"unexpected: layers\.0\.extra"):
        Backbone.from_pretrained(tmp_path)
    torch.save({"model": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: damaged, or more than weights"):
        Backbone.from_pretrained(tmp_path)


def test_what_a_language_model_lacks_is_named(tmp_path):
    model = theirs("Mamba2Model")
    model.save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match=r"backbone: missing: lm_head\.weight"):
        LanguageModel.from_pretrained(tmp_path / "backbone")
    for name, part in (("lm_head.weight", "head"), ("backbone.embedding.weight", "embedding")):
        tensors = state_spaces_folder(tmp_path / part)
        torch.save({**tensors, name: torch.zeros(48, 31)}, tmp_path / part / "pytorch_model.bin")
        with pytest.raises(ValueError, match=rf"the {part}'s weight is \(48, 31\), expected"):
            LanguageModel.from_pretrained(tmp_path / part)


def test_a_folder_that_is_not_whole_is_named(tmp_path):
    state_spaces_folder(tmp_path, {k: v for k, v in HYBRID.items() if k != "n_layer"})
    with pytest.raises(ValueError, match=r"config\.json: no n_layer in it, found attn_cfg"):
        Backbone.from_pretrained(tmp_path)
    tensors = state_spaces_folder(tmp_path)
    torch.save([*tensors.values()], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: expected tensors by name"):
        Backbone.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: no weight_map in it"):
        Backbone.from_pretrained(tmp_path)
    causal = Backbone(BackboneConfig(32, 1, d_state=8, headdim=8)).state_dict()
    both = Backbone(BackboneConfig(32, 1, d_state=8, headdim=8, bidirectional=True))
    del causal["layers.0.mixer.dt_bias"]
    assert "layers.0.mixer.dt_bias" not in layouts.match_direction(causal, both.state_dict())


@pytest.mark.parametrize("own_convolutions", [False, True])
def test_both_directions_start_from_a_causal_backbone_and_back(own_convolutions):
    torch.manual_seed(0)
    sizes = {"d_state": 8, "headdim": 8, "bias": True}
    causal = Backbone(BackboneConfig(32, 2, **sizes))
    config = BackboneConfig(32, 2, **sizes, bidirectional=True, conv_per_direction=own_convolutions)
    both = Backbone(config)
    both.load_state_dict(layouts.match_direction(causal.state_dict(), both.state_dict()))
    if own_convolutions:  # then each direction is the causal mixer, in its own order
        u = torch.randn(2, 9, 32)
        one, two = causal.layers[0].mixer, both.layers[0].mixer
        expected = scans(one, u) + scans(one, u.flip(1)).flip(1)
        torch.testing.assert_close(scans(two, u), expected, rtol=1e-5, atol=1e-5)
    back = layouts.match_direction(both.state_dict(), causal.state_dict())
    for name, tensor in causal.state_dict().items():
        assert torch.equal(back[name], tensor), name


def scans(mixer, u):
    """What a mixer's scan or scans give, (b, l, h, p), before its gate."""
    *_, xBC, dt = mixer.in_proj(u).split(mixer._split_sizes, dim=-1)
    if mixer.bidirectional:
        return mixer._scan_both_ways(xBC, dt, None, None)
    return mixer._scan(xBC, dt, None, None, None, False)[0]


def test_a_name_on_the_hub_is_downloaded(tmp_path, monkeypatch):
    state_spaces_folder(tmp_path / "bin")
    theirs().save_pretrained(tmp_path / "safe")
    calls = []

    def download(name, allow_patterns):
        calls.append(allow_patterns)
        if name == "owner/gone":
            raise OSError("404 no such repository\nmore")
        return str(tmp_path / name.partition("/")[2])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert LanguageModel.from_pretrained("owner/safe").vocab_size == 40
    assert len(calls) == 1
    assert LanguageModel.from_pretrained("owner/bin").vocab_size == 37
    assert "pytorch_model*.bin*" in calls[-1]
    with pytest.raises(FileNotFoundError, match=r"owner/gone: .*404 no such repository\)"):
        Backbone.from_pretrained("owner/gone")
    with pytest.raises(FileNotFoundError, match="no/such/folder: no such directory"):
        Backbone.from_pretrained("no/such/folder")


def folder_with_tokenizer(path):
    theirs().save_pretrained(path)
    letters = {chr(97 + i): i for i in range(26)} | {str(i): 26 + i for i in range(10)}
    letters |= {"?": 36, "!": 37, ".": 38, ",": 39}
    Tokenizer(models.BPE(vocab=letters, merges=[])).save(str(path / "tokenizer.json"))
    return path


def test_generate_on_the_command_line(tmp_path, capsys):
    folder = folder_with_tokenizer(tmp_path / "lm")
    words = ["generate", str(folder), "--prompt", "abc", "--max-new-tokens", "9"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    tokenizer, model = load_tokenizer(folder), LanguageModel.from_pretrained(folder)
    ids = tokenizer.encode("abc").ids
    prompt = torch.tensor([ids])
    tokens = torch.stack(list(model.generate(prompt, 9)), 1)[0].tolist()
    assert text == f"abc{tokenizer.decode(ids + tokens)[len(tokenizer.decode(ids)) :]}\n"
    assert "".join(text_pieces(tokenizer, ids, model.generate(prompt, 9))) == text[3:-1]
    # Its fifth token is made the one that ends a text.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[4]}))
    assert tokens[4] not in tokens[:4]
    assert cli.main(words) == 0
    assert (
        capsys.readouterr().out
        == f"abc{tokenizer.decode(ids + tokens[:5])[len(tokenizer.decode(ids)) :]}\n"
    )
    assert cli.main([*words, "--ignore-eos"]) == 0
    assert capsys.readouterr().out == text
    assert cli.main([*words, "--max-new-tokens=-1"]) == 2
    refused = capsys.readouterr()
    assert "max_new_tokens is -1, expected at least 1" in refused.err
    assert refused.out == ""
    assert cli.main([*words, "--temperature=1", "--seed=1"]) == 0
    assert cli.main(["generate", str(tmp_path), "--prompt=a"]) == 2
    (folder / "tokenizer.json").unlink()
    assert cli.main(words) == 2
    assert "put the checkpoint's tokenizer there" in capsys.readouterr().err
