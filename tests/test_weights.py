import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minisgl import weights
from minisgl.errors import MinisglError
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.parallel import ParallelGroup
from minisgl.shards import Ranks
from minisgl.weights import load_weights, resolve_model
from tests.tiny_models import make

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return {name: make(name, tmp_path_factory.mktemp(name)) for name in ("llama", "qwen2", "qwen3-yarn")}


@pytest.fixture
def folder(originals, tmp_path):
    """A copy of an untied checkpoint that a test may change."""
    return shutil.copytree(originals["llama"], tmp_path / "model")


def new_decoder(folder, dtype=torch.float32):
    decoder = Decoder(ModelConfig.from_folder(folder), device=CPU, dtype=dtype, max_len=32)
    for target in decoder.targets().values():
        target.parameter.fill_(torch.nan)
    return decoder


def change(folder, **changes):
    """Rewrite the checkpoint with these tensors replaced; None removes one."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): x for name, x in changes.items()}
    save_file({name: x for name, x in tensors.items() if x is not None}, path)


def assert_holds(decoder, tensors):
    for name, target in decoder.targets().items():
        assert torch.equal(target.parameter, tensors[name].to(target.parameter.dtype)), name


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-yarn"])  # untied; tied and with biases; with qk norms
def test_every_tensor_arrives(originals, name):
    decoder = new_decoder(originals[name])
    load_weights(decoder, originals[name])
    stored = load_file(originals[name] / "model.safetensors")
    assert stored.keys() == decoder.targets().keys()
    assert_holds(decoder, stored)


def test_fused_parameters_stack_their_parts(originals):
    decoder = new_decoder(originals["qwen2"])
    load_weights(decoder, originals["qwen2"])
    stored = load_file(originals["qwen2"] / "model.safetensors")
    q, k, v = (stored[f"model.layers.1.self_attn.{part}_proj.bias"] for part in "qkv")
    assert torch.equal(decoder.layers[1].attention.qkv.bias, torch.cat((q, k, v)))
    gate, up = (stored[f"model.layers.2.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.equal(decoder.layers[2].mlp.gate_up.weight, torch.cat((gate, up)))
    assert decoder.lm_head is decoder.embed.weight


@pytest.mark.parametrize("stored, wanted", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_dtype_is_converted(folder, stored, wanted):
    tensors = {name: x.to(stored) for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    decoder = new_decoder(folder, wanted)
    load_weights(decoder, folder)
    assert_holds(decoder, tensors)


def test_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    (folder / "consolidated.safetensors").write_bytes(b"another format: the index does not name it")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    decoder = new_decoder(folder)
    load_weights(decoder, folder)
    assert_holds(decoder, tensors)

    shards[1].unlink()
    with pytest.raises(
        MinisglError, match=rf"lacks shards \({shards[1].name}\) of its index; download the model again"
    ):
        load_weights(decoder, folder)


@pytest.mark.parametrize("weight_map", [None, [], "model.safetensors", {"lm_head.weight": 1}, {"lm_head.weight": None}])
def test_an_index_that_names_no_files(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(MinisglError, match="index.json: weight_map must name a file for each tensor"):
        load_weights(new_decoder(folder), folder)


def test_any_name_of_the_only_file(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    decoder = new_decoder(folder)
    load_weights(decoder, folder)
    assert_holds(decoder, tensors)


def test_what_does_not_fit_is_named_at_once(folder):
    change(
        folder,
        model__norm__weight=None,
        model__layers__0__mlp__down_proj__weight=torch.zeros(3, 5),
        model__layers__0__mlp__router__weight=torch.zeros(1),
    )
    decoder = new_decoder(folder)
    with pytest.raises(MinisglError) as caught:
        load_weights(decoder, folder)
    message = str(caught.value)
    assert "1 missing (model.norm.weight)" in message
    assert "1 unexpected (model.layers.0.mlp.router.weight)" in message
    assert "1 of the wrong shape (model.layers.0.mlp.down_proj.weight is [3, 5], expected [72, 100])" in message
    assert decoder.embed.weight.isnan().all()  # nothing was copied


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool, torch.float64])
def test_tensors_that_are_no_weights_are_refused(folder, dtype):
    change(folder, model__norm__weight=torch.ones(100).to(dtype))
    with pytest.raises(MinisglError, match="1 of a type other than BF16, F16 and F32 .model.norm.weight is "):
        load_weights(new_decoder(folder), folder)


def test_long_lists_are_cut(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 5}))
    with pytest.raises(MinisglError, match=r"18 missing \(model.layers.3.*, model.layers.3.*, 14 more\)"):
        load_weights(new_decoder(folder), folder)


def test_a_head_that_is_not_tied_must_be_there(folder):
    change(folder, lm_head__weight=None)
    with pytest.raises(MinisglError, match=r"1 missing \(lm_head.weight\)"):
        load_weights(new_decoder(folder), folder)


def test_harmless_tensors_are_ignored(originals, tmp_path):
    folder = shutil.copytree(originals["qwen2"], tmp_path / "model")
    change(folder, lm_head__weight=torch.zeros(2), model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(3))
    load_weights(new_decoder(folder), folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf"])
def test_other_formats_are_refused(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(MinisglError, match=f"has only {name}; minisgl reads safetensors"):
        load_weights(new_decoder(folder), folder)


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(MinisglError, match="has no weights; minisgl reads safetensors"):
        load_weights(new_decoder(folder), folder)


def test_a_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MinisglError, match=r"cannot read .*model.safetensors .*download the model again"):
        load_weights(new_decoder(folder), folder)


def test_dummy_weights(folder):
    (folder / "model.safetensors").unlink()
    first, same, other = (new_decoder(folder) for _ in range(3))
    for decoder, seed in ((first, 1), (same, 1), (other, 2)):
        load_weights(decoder, folder, "dummy", seed)
    assert torch.equal(first.lm_head, same.lm_head)
    assert not torch.equal(first.lm_head, other.lm_head)
    assert torch.equal(first.norm.weight, torch.ones(72))
    assert all(target.parameter.isfinite().all() for target in first.targets().values())


class Member(ParallelGroup):
    """One of several ranks, which exchange nothing while they load."""

    def __init__(self, rank, size):
        self.ranks = Ranks(rank, size)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-yarn"])
def test_ranks_hold_slices_of_the_same_weights(originals, name, size, load_format):
    folder, config = originals[name], ModelConfig.from_folder(originals[name])
    whole = new_decoder(folder)
    load_weights(whole, folder, load_format)
    seen = {key: torch.zeros_like(target.parameter) for key, target in whole.targets().items()}
    for rank in range(size):
        decoder = Decoder(config, device=CPU, dtype=torch.float32, max_len=32, group=Member(rank, size))
        for target in decoder.targets().values():
            target.parameter.fill_(torch.nan)
        load_weights(decoder, folder, load_format)
        for key, target in decoder.targets().items():
            held = target.parameter.clone()
            for at, start, length in target.cut.pieces:
                piece = held.narrow(target.dim, at, length)
                full = whole.targets()[key].parameter.narrow(target.dim, start, length)
                assert torch.equal(piece, full), key
                seen[key].narrow(target.dim, start, length).add_(1)
                piece.zero_()
            assert torch.equal(held, torch.zeros_like(held)), key  # what pads a slice
    for key, times in seen.items():
        shared = "norm" in key or "k_proj" in key or "v_proj" in key
        assert times.min() >= 1 and (shared or times.max() == 1), key


# -- where a model is --


def test_local_folders(folder, tmp_path, monkeypatch):
    assert resolve_model(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve_model("model").samefile(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MinisglError, match="folder empty has no config.json"):
        resolve_model("empty")
    with pytest.raises(MinisglError, match="is a file; name the folder"):
        resolve_model(str(folder / "config.json"))


@pytest.mark.parametrize("model", ["/no/such/folder", "./models/x", "../x", "~/models/x", "a/b/c", "models/", "C:\\x"])
def test_what_looks_like_a_folder_is_not_sought_on_the_hub(model, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(weights, "_download", lambda model: pytest.fail("asked the hub"))
    with pytest.raises(MinisglError, match="does not exist; name an existing folder or a Hugging Face id"):
        resolve_model(model)


def test_the_demo_model_is_the_default():
    from minisgl.demo import MODEL_PATH

    assert resolve_model("") == MODEL_PATH


def hub_error(name):
    import huggingface_hub.errors

    error = getattr(huggingface_hub.errors, name)
    made = error.__new__(error)
    made.args = ("first line\nsecond line",)
    return made


@pytest.mark.parametrize(
    "error, message",
    [
        ("RepositoryNotFoundError", "cannot find org/name: there is no such folder here nor model on huggingface.co"),
        (
            "GatedRepoError",
            "it is gated: accept its licence at https://huggingface.co/org/name, then run `hf auth login`",
        ),
        (
            "LocalEntryNotFoundError",
            r"cannot download org/name \(.*\); check the network and the disk, or name a local",
        ),
    ],
)
def test_download_errors_are_one_line(monkeypatch, error, message):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise hub_error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(MinisglError, match=message) as caught:
        resolve_model("org/name")
    assert "\n" not in str(caught.value)


def test_only_what_is_read_is_downloaded(monkeypatch, folder):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    repository = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    repository += ["tokenizer.model", "chat_template.jinja", "generation_config.json", "merges.txt"]
    useless = [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "onnx/model.onnx",
        "original/model.safetensors",
        "x.gguf",
    ]

    def download(model, allow_patterns, ignore_patterns):
        assert model == "org/name"
        kept = filter_repo_objects(repository + useless, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        assert list(kept) == repository
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("org/name") == folder
