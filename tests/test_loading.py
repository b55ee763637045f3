"""The one place where 4-bit models are loaded: what it promises, and what it refuses."""

import logging
import shutil
import warnings
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import transformers
from bitsandbytes.functional import has_avx512bf16
from safetensors.torch import load_file
from tiny_model import tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import qlora_lab
from qlora_lab import loading
from qlora_lab.errors import InputError
from qlora_lab.loading import EMBEDDED, cannot_load, four_bit_layers, load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose layers are 64 and 128 wide."""
    path = tmp_path_factory.mktemp("base")
    tiny_model().to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A checkpoint whose layers are 96 wide: no multiple of the block size."""
    path = tmp_path_factory.mktemp("narrow")
    shape = {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, num_hidden_layers=1, **shape)
    LlamaForCausalLM(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def refusal(*args, **kwargs) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(InputError) as caught:
        load_model(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# --- four bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("embedded", [True, False])
def test_the_default_is_nf4_with_double_quantization_and_guards(folder, embedded):
    model, _, report = load_model(None if embedded else folder)
    layers = four_bit_layers(model)
    linear = {
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n
    }
    assert set(layers) == linear and len(linear) == 7 * model.config.num_hidden_layers
    for layer in layers.values():
        state = layer.weight.quant_state
        assert state.quant_type == "nf4" and state.blocksize == 64
        assert state.nested and state.state2.blocksize == 256
        assert layer.compute_dtype == torch.float32
        assert layer.support_avx512bf16_for_cpu is False
    assert report.guarded == len(layers) and report.bits == 4
    assert "NF4" in report.scheme and "double quantization" in report.scheme
    assert not model.training


def test_weights_are_what_bitsandbytes_makes_of_the_checkpoint(folder):
    stored = load_file(folder / "model.safetensors")
    for name, layer in four_bit_layers(load_model(folder).model).items():
        weight = stored[f"{name}.weight"].float()
        codes, state = bnb.functional.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=True
        )
        assert torch.equal(layer.weight.data, codes)
        got = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(got, bnb.functional.dequantize_4bit(codes, state))


def test_options_of_four_bits_reach_the_layers(folder):
    loaded = load_model(folder, quant_type="fp4", double_quant=False, quant_storage=torch.float32)
    for layer in four_bit_layers(loaded.model).values():
        state = layer.weight.quant_state
        assert state.quant_type == "fp4" and not state.nested
        assert layer.weight.dtype == torch.float32
        assert layer.support_avx512bf16_for_cpu is False
    assert loaded.report.scheme == "FP4, blocks of 64, float32 scales"
    assert loaded.report.parameters == load_model(folder, bits=16).report.parameters


def test_no_other_module_loads_four_bits():
    package = Path(qlora_lab.__file__).parent
    found = {p.name for p in package.rglob("*.py") if "load_in_4bit=True" in p.read_text("utf-8")}
    assert found == {"loading.py"}


# --- the report ------------------------------------------------------------------------------


def tensors_of(state):
    """All tensors of a quant_state, found by looking and not by name."""
    for value in vars(state).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif hasattr(value, "absmax"):
            yield from tensors_of(value)


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_numbers_of_a_4_bit_report_are_sums_over_tensors(folder, double_quant):
    model, _, report = load_model(folder, double_quant=double_quant)
    stored = [*model.parameters(), *model.buffers()]
    assert report.weight_bytes == sum(t.numel() * t.element_size() for t in stored)
    constants = [
        t for m in four_bit_layers(model).values() for t in tensors_of(m.weight.quant_state)
    ]
    assert report.constant_bytes == sum(t.numel() * t.element_size() for t in constants)
    assert report.constant_bytes > 0
    assert report.total_bytes == report.weight_bytes + report.constant_bytes
    assert report.parameters == sum(p.numel() for p in tiny_model().parameters())


def test_the_numbers_of_the_other_reports_are_sums_too(folder):
    model, _, report = load_model(folder, bits=16)
    count = sum(p.numel() for p in tiny_model().parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    assert (report.parameters, report.constant_bytes) == (count, 0)
    assert report.weight_bytes == 4 * count + buffers
    model, _, report = load_model(folder, bits=8)
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    quantized = sum(m.weight.numel() for m in layers)
    assert report.parameters == count
    assert report.weight_bytes == quantized + 4 * (count - quantized) + buffers
    assert report.constant_bytes == 4 * sum(m.out_features for m in layers)  # a scale for each row


def test_the_report_says_what_why_and_how_much(folder):
    report = load_model().report
    assert report.name == EMBEDDED
    text = str(report)
    for part in (EMBEDDED, f"{report.parameters:,}", "NF4", "float32", report.reason, "28 layers"):
        assert part in text
    assert f"{report.total_bytes / 1e6:,.2f} MB" in text
    assert load_model(folder).report.name == folder.name  # no folder of this machine


# --- dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "native", "dtype", "word"),
    [
        ("cpu", None, torch.float32, "CPU"),
        ("cuda", True, torch.bfloat16, "native"),
        ("cuda", False, torch.float16, "loss scaling"),
    ],
)
def test_the_dtype_is_decided_by_what_is_native(monkeypatch, device, native, dtype, word):
    def is_supported(including_emulation=True):
        assert not including_emulation, "a T4 emulates bfloat16 and would say yes"
        assert native is not None, "a CPU does not ask the GPU"
        return native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    got, reason = loading.choose_dtype(device)
    assert got == dtype and word in reason


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_cpu_computes_in_float32(folder, bits):
    model, tokenizer, report = load_model(folder, bits=bits, device="cpu")
    assert report.compute_dtype == torch.float32 and report.device == "cpu"
    with torch.no_grad(), loading.quiet():
        logits = model(**tokenizer("two lattes", return_tensors="pt")).logits
    assert logits.dtype == torch.float32 and logits.isfinite().all()


def test_sixteen_bits_keep_every_value_of_the_checkpoint(folder):
    model = load_model(folder, bits=16).model
    state = model.state_dict()
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(state[name], tensor.float())


def test_fewer_bits_are_further_from_the_checkpoint(folder):
    ids = torch.arange(3, 60)[None]
    with torch.no_grad(), loading.quiet():
        logits = {b: load_model(folder, bits=b).model(ids).logits for b in (4, 8, 16)}
    near = (logits[8] - logits[16]).abs().mean()
    far = (logits[4] - logits[16]).abs().mean()
    assert 0 < near < far < logits[16].abs().mean()


def test_the_compute_dtype_can_be_asked_for(folder):
    model, _, report = load_model(folder, compute_dtype=torch.bfloat16)
    assert report.compute_dtype == torch.bfloat16 and report.reason == "it was asked for"
    assert {m.compute_dtype for m in four_bit_layers(model).values()} == {torch.bfloat16}
    assert load_model(folder, 16, compute_dtype=torch.float16).model.dtype == torch.float16


# --- padding ---------------------------------------------------------------------------------


def test_the_embedded_tokenizer_pads_with_a_token_of_its_own():
    tokenizer = load_model(bits=16).tokenizer
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert tokenizer.padding_side == "right"


@pytest.mark.parametrize("pad", [None, "<|eos|>"])
def test_padding_with_the_end_token_is_mended_or_refused(folder, tmp_path, pad):
    shutil.copytree(folder, tmp_path / "base")
    tokenizer = load_model(folder, bits=16).tokenizer
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path / "base")
    assert "pad" in refusal(tmp_path / "base", bits=16)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|fim_pad|>"]})
    tokenizer.save_pretrained(tmp_path / "base")
    mended = load_model(tmp_path / "base", bits=16).tokenizer
    assert mended.pad_token == "<|fim_pad|>" and mended.pad_token_id != mended.eos_token_id


# --- the guards ------------------------------------------------------------------------------


def test_a_width_that_is_no_multiple_of_the_block_is_refused_in_4_bits_only(narrow):
    message = refusal(narrow)
    assert "96" in message and "64" in message and "16 bits" in message
    for bits in (8, 16):
        assert load_model(narrow, bits=bits).report.guarded == 0


def layer_with_blocks_of(blocksize: int, width: int) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(width, 64, bias=False, quant_type="nf4")
    torch.manual_seed(0)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(64, width), requires_grad=False, quant_type="nf4", blocksize=blocksize
    )
    return layer.to("cpu")


def test_the_guard_asks_each_layer_for_its_own_block_size():
    good = nn.Sequential(layer_with_blocks_of(128, 256), layer_with_blocks_of(64, 704))
    assert loading.guard(good) == 2
    with pytest.raises(InputError, match="layer 0 is 704 wide.* 128"):
        loading.guard(nn.Sequential(layer_with_blocks_of(128, 704)))


@pytest.mark.skipif(
    not has_avx512bf16(),
    reason="this CPU has no AVX512-BF16; the kernel that indexes scales by row was met there only",
)
def test_fault_1_without_the_guard_such_a_layer_reads_wrong_scales():
    layer = layer_with_blocks_of(128, 704)
    torch.manual_seed(0)
    read = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert (read - torch.randn(64, 704)).abs().mean() > 0.1  # 0.077 where it is right


# --- names and places ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "portable"),
    [
        (EMBEDDED, EMBEDDED),
        ("/srv/anna/lab/qlora_lab/assets/model", EMBEDDED),
        ("/srv/anna/lab/qlora_lab/assets/model/", EMBEDDED),
        ("C:\\lab\\Anna\\lab\\qlora_lab\\assets\\model", EMBEDDED),
        ("..\\qlora_lab/assets\\model\\", EMBEDDED),
        ("org/model", "org/model"),
        ("/srv/anna/my_qlora_lab/assets/model", "/srv/anna/my_qlora_lab/assets/model"),
        ("C:\\models\\llama", "C:\\models\\llama"),
    ],
)
def test_the_embedded_model_has_one_name_on_every_machine(name, portable):
    assert loading.portable_name(name) == portable
    expected = qlora_lab.embedded_model() if portable == EMBEDDED else name
    if name != EMBEDDED or not Path(name).is_dir():  # from the repository's root it is a folder
        assert loading.find(name) == expected


def test_the_portable_name_loads_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_model(EMBEDDED, bits=16).report.name == EMBEDDED


def test_the_embedded_model_loads_without_this_package():
    model = AutoModelForCausalLM.from_pretrained(qlora_lab.embedded_model())
    assert isinstance(model, LlamaForCausalLM)


def hub_cache(root: Path, repo: str, files: Path) -> None:
    """What a download of a hub repository leaves on the disk."""
    where = root / f"models--{repo.replace('/', '--')}"
    revision = "0" * 40
    shutil.copytree(files, where / "snapshots" / revision)
    (where / "refs").mkdir()
    (where / "refs" / "main").write_text(revision)


def test_a_hub_name_takes_the_same_path(folder, tmp_path, monkeypatch):
    hub_cache(tmp_path, "someone/tiny", folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    asked = []
    original = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(name, **kwargs):
        asked.append(name)
        return original(name, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    hub, local = load_model("someone/tiny"), load_model(folder)
    assert asked == ["someone/tiny", str(folder)]
    assert hub.report.name == "someone/tiny"
    for name, layer in four_bit_layers(hub.model).items():
        assert torch.equal(layer.weight.data, four_bit_layers(local.model)[name].weight.data)


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["no/such/folder", "nobody/nothing", "two words", "/no/such", "./no"]
)
def test_unknown_names_are_refused(name):
    message = refusal(name)
    assert repr(name) in message and "hub name" in message


@pytest.mark.parametrize(
    "name", ["no/such/folder", "./no", "/no/such", "two words", Path("no/such")]
)
def test_the_hub_is_not_asked_for_a_path(monkeypatch, name):
    def ask(*args, **kwargs):
        raise AssertionError("asked")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", ask)
    assert "there is no such folder" in refusal(name)


@pytest.mark.parametrize("name", [3, "", ["gpt2"], True])
def test_what_is_no_name_is_refused(name):
    assert "is not possible; give a path" in refusal(name)


def test_no_stack_of_the_hub_stands_behind_the_sentence(tmp_path):
    for name in ("nobody/nothing", tmp_path):
        for load in (load_model, loading.load_config):
            with pytest.raises(InputError, match="cannot be loaded") as caught:
                load(name)
            assert caught.value.__suppress_context__ and caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "unheard of"}'),
        ("model.safetensors", None),
        ("model.safetensors", b"cut off"),
        ("tokenizer.json", None),
    ],
)
def test_damaged_folders_are_refused(folder, tmp_path, file, content):
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    (base / file).unlink()
    if content is not None:
        (base / file).write_bytes(content)
    message = refusal(base)
    assert str(base) in message and "(" in message  # says what is wrong in the folder


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"bits": 3}, "bits=3"),
        ({"bits": 32}, "4, 8 or 16"),
        ({"bits": "4"}, "bits='4'"),
        ({"bits": 4.0}, "bits=4.0"),
        ({"device": 0}, "device 0"),
        ({"compute_dtype": "bfloat16"}, "compute dtype 'bfloat16'"),
        ({"quant_storage": None}, "storage dtype None"),
        ({"device": "tpu"}, "'tpu'"),
        ({"quant_type": "int4"}, "'int4'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(arguments, says):
    assert says in refusal("no/such/folder", **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_is_refused_where_there_is_none(folder):
    assert "no CUDA device" in refusal(folder, device="cuda")
    assert loading.default_device() == "cpu"


def test_a_loaded_model_is_asked_for_its_model(folder):
    loaded = load_model(folder)
    for helper in (loading.guard, four_bit_layers):
        with pytest.raises(InputError, match="of type Loaded .* its .model"):
            helper(loaded)
    with pytest.raises(InputError, match="of type Loaded .* its .tokenizer"):
        loading.give_padding(loaded)


# --- quiet -----------------------------------------------------------------------------------


def test_loading_writes_nothing(folder, capfd):
    load_model(folder)
    assert capfd.readouterr() == ("", "")


def test_quiet_puts_everything_back(monkeypatch):
    from transformers.utils import logging as hf_logging

    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "level", logging.INFO)
    bars = hf_logging.is_progress_bar_enabled()
    with pytest.raises(KeyError), loading.quiet():
        assert logger.level == logging.ERROR and not hf_logging.is_progress_bar_enabled()
        warnings.warn("an old name", FutureWarning, stacklevel=1)  # pytest would show it
        raise KeyError
    assert logger.level == logging.INFO
    assert hf_logging.is_progress_bar_enabled() == bars
    with pytest.warns(FutureWarning):
        warnings.warn("an old name", FutureWarning, stacklevel=1)


def test_why_a_name_cannot_be_loaded_is_said():
    gated = OSError("You are trying to access a gated repo.\nMake sure to have access to it.")
    assert str(cannot_load("a/b", gated)).startswith(
        "'a/b' cannot be loaded (You are trying to access a gated repo.); "
    )
