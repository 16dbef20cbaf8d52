"""Makes the checkpoints of this folder with the packages whose formats they are; the tests need none of those.

    pip install torch transformers safetensors hqq bitsandbytes torchao auto-round neural-compressor-pt
    python tests/quant/golden/make.py OUT [NAME ...]

Each case is a Llama of one block, quantized and saved by its package, with `expected.json` beside it: for each layer
the shape, and the SHA-256 and first values of the weight (float32, row by row) that the package itself computes with.
A module gives its weight when it is fed the identity.
"""

import contextlib
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny(seed, *, tied=True, width=32):
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 64, "vocab_size": 32, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))
    for parameter in model.parameters():
        parameter.data.copy_(
            (torch.randn_like(parameter) * 0.2 + (0.8 if parameter.ndim == 1 else 0.05)).half().float()
        )
    return model.eval()


def projections(model):
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS}


def fed_identity(module, inputs, dtype):
    with torch.no_grad():
        out = module(torch.eye(inputs, dtype=dtype))
        return (out - module(torch.zeros(1, inputs, dtype=dtype))).T


def expect(folder, weights):
    told = {}
    for name, weight in weights.items():
        values = weight.detach().to(torch.float32).contiguous() + 0.0  # -0.0 and 0.0 are one weight
        digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()
        dtype, head = str(weight.dtype).removeprefix("torch."), values.flatten()[:8].tolist()
        told[name] = {"shape": list(weight.shape), "dtype": dtype, "sha256": digest, "head": head}
    (folder / "expected.json").write_text(json.dumps(told, sort_keys=True) + "\n")


def sizes_of(name):
    return 64 if name.endswith("down_proj") else 32


# -- auto-round: its own format, GPTQ's and AWQ's ----------------------------------------------------------------------


class Words:
    """A tokenizer, as far as auto-round asks for one."""

    def save_pretrained(self, *_):
        return ()


def auto_round(folder, form, **options):
    from auto_round import AutoRound

    data = [torch.randint(0, 32, (1, 16)) for _ in range(4)]
    rounder = AutoRound(
        tiny(7),
        tokenizer=Words(),
        dataset=data,
        iters=1,
        nsamples=4,
        seqlen=16,
        batch_size=2,
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
        **options,
    )
    rounder.quantize_and_save(str(folder), format=form)
    for found in list(folder.rglob("model.safetensors")):
        for file in list(found.parent.iterdir()):
            if file.parent != folder:
                shutil.move(str(file), folder / file.name)


def auto_round_case(form, **options):
    def make(folder):
        auto_round(folder, form, **options)
        told = json.loads((folder / "config.json").read_text())["quantization_config"]
        layout = told["quant_method"] + told.get("packing_format", "")
        if "awq" in layout:
            expect(folder, awq_weights(folder, options["group_size"]))
        else:
            expect(folder, gptq_weights(folder, options["bits"], options["group_size"], layout))

    return make


def gptq_weights(folder, bits, group, form):
    from safetensors.torch import load_file

    if "gptq" in form:
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    else:
        from auto_round_extension.torch.qlinear_torch import QuantLinear
    tensors, weights = load_file(folder / "model.safetensors"), {}
    for name in sorted({key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")}):
        inputs, outputs = sizes_of(name), tensors[f"{name}.scales"].shape[1]
        # With g_idx (which is 0, 0, ..., 1, 1, ... here) its forward takes only the first K of N columns.
        layer = QuantLinear(bits, group, inputs, outputs, bias=False)
        layer.load_state_dict({key: tensors[f"{name}.{key}"] for key in layer.state_dict()})
        layer.post_init()
        weights[name] = fed_identity(layer, inputs, torch.float16)
    return weights


def awq_weights(folder, group):
    from auto_round.export.export_to_awq import utils
    from safetensors.torch import load_file

    tensors, weights = load_file(folder / "model.safetensors"), {}
    for name in sorted({key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")}):
        parts = [tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
        weights[name] = utils.dequantize_gemm(*parts, 4, group).T
    return weights


# -- bitsandbytes ------------------------------------------------------------------------------------------------------


def bnb_case(**options):
    def make(folder):
        import bitsandbytes as bnb
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        with tempfile.TemporaryDirectory() as float_folder:
            # bitsandbytes 0.50 dequantizes on a CPU as if blocks began at each row; with rows of 64 they do.
            tiny(3, width=64).save_pretrained(float_folder)
            config = BitsAndBytesConfig(**options)
            model = AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=config, device_map="cpu")
        model.save_pretrained(folder)
        weights = {}
        for name, module in projections(model).items():
            if isinstance(module, bnb.nn.Linear4bit):
                weights[name] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            else:
                scb = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
                weights[name] = bnb.functional.int8_vectorwise_dequant(module.weight.data, scb).float()
        expect(folder, weights)

    return make


# -- torchao -----------------------------------------------------------------------------------------------------------


def torchao_case(config_name, **options):
    def make(folder):
        import torchao.quantization as ao
        from safetensors.torch import save_file
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
        from transformers import TorchAoConfig

        model = tiny(5)
        config = getattr(ao, config_name)(**options)
        names = set(projections(model))
        ao.quantize_(model, config, filter_fn=lambda module, name: name in names)
        state = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
        tensors, metadata = flatten_tensor_state_dict(state)
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **metadata})
        model.config.quantization_config = TorchAoConfig(config)
        model.config.save_pretrained(folder)
        expect(folder, {name: module.weight.dequantize() for name, module in projections(model).items()})

    return make


# -- hqq ---------------------------------------------------------------------------------------------------------------


def torchao_int4(folder):
    from torchao.quantization import MappingType
    from torchao.quantization.granularity import PerGroup

    options = {"granularity": PerGroup(16), "mapping_type": MappingType.ASYMMETRIC}
    torchao_case("IntxWeightOnlyConfig", weight_dtype=torch.int4, **options)(folder)


def hqq_case(**options):
    def make(folder):
        from hqq.core.quantize import BaseQuantizeConfig
        from hqq.models.hf.base import AutoHQQHFModel

        model = tiny(11, tied=False)
        AutoHQQHFModel.quantize_model(
            model, quant_config=BaseQuantizeConfig(**options), compute_dtype=torch.float32, device="cpu"
        )
        weights = {name: module.dequantize() for name, module in projections(model).items()}
        shutil.rmtree(folder)
        AutoHQQHFModel.save_to_safetensors(model, str(folder))
        expect(folder, weights)

    return make


# -- Neural Compressor -------------------------------------------------------------------------------------------------


def inc_case(config_name, form, **options):
    def make(folder):
        from neural_compressor.torch import quantization as inc

        with tempfile.TemporaryDirectory() as float_folder:
            tiny(13).save_pretrained(float_folder)
            model = LlamaForCausalLM.from_pretrained(float_folder).eval()
            config = getattr(inc, config_name)(**options)
            data = [torch.randint(0, 32, (1, 16)) for _ in range(4)]

            def run(prepared):
                for ids in data:
                    prepared(ids)

            model = inc.prepare(model, config, example_inputs=data[0])
            with contextlib.suppress(ValueError):
                run(model)
            model = inc.convert(model)
        weights = {}
        for name, module in model.named_modules():
            if type(module).__name__ == "INCWeightOnlyLinear":
                weights[name.removesuffix(".linear")] = module.recover()
        model.save(str(folder), format=form)
        config = folder / "qconfig.json"
        if config.exists():  # it names a folder of the machine
            config.write_text(config.read_text().replace(float_folder, ""))
        expect(folder, weights)

    return make


CASES = {
    "auto_round_w2_asym": auto_round_case("auto_round", bits=2, group_size=32, sym=False),
    "auto_round_gptq_w4": auto_round_case("auto_round:auto_gptq", bits=4, group_size=32, sym=True),
    "auto_round_awq_w4": auto_round_case("auto_round:auto_awq", bits=4, group_size=32, sym=False),
    "gptq_w3_asym": auto_round_case("auto_gptq", bits=3, group_size=32, sym=False),
    "gptq_w4_asym": auto_round_case("auto_gptq", bits=4, group_size=16, sym=False),
    "gptq_w8_sym": auto_round_case("auto_gptq", bits=8, group_size=32, sym=True),
    "awq_w4_asym": auto_round_case("auto_awq", bits=4, group_size=32, sym=False),
    "bnb_nf4": bnb_case(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bnb_fp4_double": bnb_case(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    "bnb_int8": bnb_case(load_in_8bit=True),
    "torchao_int4": torchao_int4,
    "torchao_int8_dynamic": torchao_case("Int8DynamicActivationInt8WeightConfig"),
    "torchao_float8": torchao_case("Float8WeightOnlyConfig"),
    "hqq_w4": hqq_case(nbits=4, group_size=64, axis=1),
    "hqq_w3": hqq_case(nbits=3, group_size=32, axis=1),
    "hqq_w2": hqq_case(nbits=2, group_size=16, axis=1),
    "inc_rtn_w4": inc_case("RTNConfig", "default", use_sym=False, group_size=16, use_layer_wise=False),
    "inc_rtn_w3": inc_case("RTNConfig", "default", bits=3, use_sym=True, group_size=32, use_layer_wise=False),
    "inc_rtn_nf4": inc_case("RTNConfig", "default", dtype="nf4", group_size=32, use_layer_wise=False),
    "inc_awq_w4": inc_case("AWQConfig", "default", use_sym=False, group_size=32),
    "inc_gptq_act_order": inc_case("GPTQConfig", "huggingface", use_sym=False, group_size=16, act_order=True),
}


if __name__ == "__main__":
    out, *names = sys.argv[1:]
    for case in names or CASES:
        target = Path(out, case)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        CASES[case](target)
        kept = {"config.json", "quantize_config.json", "qconfig.json", "model.safetensors", "quantized_weight.pt"}
        for extra in list(target.iterdir()):
            if extra.is_dir():
                shutil.rmtree(extra)
            elif extra.name not in kept | {"expected.json"}:
                extra.unlink()
        print(case, sum(file.stat().st_size for file in target.rglob("*")), "bytes")  # noqa: T201
