"""What serving engines do with the dense twin of every MoE type: ``python tests/engines.py --vllm PYTHON --llama-cpp FOLDER``.

Run by hand: engines are no requirement of this project. PYTHON has vLLM (also its CPU build, without torchvision); FOLDER is a
checkout of llama.cpp, whose converter runs in this Python. A tiny MoE of each type, its sizes eight times those of
``moe_types.yaml``, for kernels take no smaller ones, is converted here. vLLM gives log-probabilities of a prompt and of
transformers' greedy continuation, which are compared with transformers' own. The outcomes go to ``engines.csv``, from which
``moe_table.py`` writes columns of the table of types.
"""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from unittest.mock import MagicMock

OUTCOMES = Path(__file__).with_name("engines.csv")
SCALE = 8
# Sizes in configs that grow; all other numbers stay.
SIZES = re.compile(
    r"^((.*_)?hidden_size|d_model|d_kv|d_ff|model_dim|.*intermediate_size(_mlp)?|.*head_dim(_k|_v)?|.*lora_rank|.*_latent_size"
    r"|.*ffn_dim|mlp_dim|.*out_dim|output_dim|adapter_in_dim|adapter_input_size|out_hidden_size|output_channels"
    r"|mamba_d_head|downsample_channels|mrope_section|sliding_window|attention_chunk_size|share_expert_dim|router_hidden_size|prefix_dense_intermediate_size)$"
)
# As in published models, since vLLM's code for CPUs takes no other.
FIXED = {"linear_conv_kernel_dim": 4, "linear_value_head_dim": 64, "conv_L_cache": 3}
FIXED |= {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "attention_chunk_size": 128}
FACTORS = re.compile(r"^(short|long)_factor$")  # of each frequency of RoPE
# As in published configs: vLLM does not have these biases and clips, and it reads names that transformers does not keep.
CHANGES = {
    "qwen3_moe": {"attention_bias": False},
    "deepseek_v2": {"mlp_bias": False},
    "deepseek_v3": {"attention_bias": False},
    "olmoe": {"clip_qkv": None},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "afmoe": {"n_group": 1, "topk_group": 1},
    "minimax_m2": {"rotary_dim": 48, "scoring_func": "sigmoid"},
}
TOLERANCE = 2e-3  # of log-probabilities in float32
NOT_ON_CPU = r"(?i)\bcpu\b|cuda|triton|flashinfer|no valid attention backend|_OpNamespace|_lib_fn_wrapper"
SECONDS = 600  # for one model


def larger(config):
    """A tiny config with widths eight times as large."""

    def grown(name, value):
        if isinstance(value, dict):
            return larger(value)
        if name in FIXED:
            return FIXED[name]
        if FACTORS.match(str(name)):
            return SCALE * value  # a longer list
        if not SIZES.match(str(name)) or not value:
            return value
        return [SCALE * v for v in value] if isinstance(value, list) else SCALE * value

    return {name: grown(name, value) for name, value in config.items()}


def make(kind, folder, engine=""):
    """Convert a tiny MoE to ``folder / kind``, with what transformers' log-probabilities of some tokens are."""
    import torch  # here and below: the engine's python runs this file too, without what this function needs
    from tiny_moes import moe
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    from ones_lib.checkpoints import convert
    from ones_lib.models.causal import load_language_model

    model = moe(kind, **larger(CONFIGS[kind] | CHANGES.get(kind, {})))
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim > 1:
                tensor.mul_(SCALE**-0.5)  # as large activations as in the tiny model
    model.save_pretrained(folder / "moe" / kind)
    convert(folder / "moe" / kind, folder / kind, "topk", "active", engine=engine)
    ids = torch.randint(11, 55, (1, 24), generator=torch.Generator().manual_seed(1))
    expected = {"architecture": json.loads((folder / kind / "config.json").read_text())["architectures"][0]}
    if (
        model.can_generate()
        and not model.config.is_encoder_decoder
        and not hasattr(model, "thinker")
        and kind != "diffusion_gemma"
    ):
        twin = load_language_model(folder / kind).float()
        with torch.no_grad():
            MoeCausalLMOutputWithPast.image_outputs = None  # transformers 5.24: Llama 4's forward pass reads it
            made = twin.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
            found = twin(made).logits.float().log_softmax(-1)[0, :-1].gather(1, made[0, 1:, None])
        expected |= {"ids": made[0].tolist(), "logprobs": found[:, 0].tolist()}
    (folder / kind / "expected.json").write_text(json.dumps(expected))


def in_child(work, folder):
    """Outcome and reason of ``work`` on a folder, in a process that is forked from this one, which has done the imports."""
    result, log = (folder / f"{work.__name__}.{kind}" for kind in ("json", "log"))
    result.write_text(json.dumps(["does not start", f"no answer within {SECONDS} s, or killed"]))
    if (child := os.fork()) == 0:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        signal.alarm(SECONDS)
        try:
            found = work(folder)
        except BaseException as error:  # what an engine raises is the result
            traceback.print_exc()
            found = "does not start", root(error).replace(f"{folder}/", "")
        result.write_text(json.dumps(found))
        os._exit(0)
    os.waitpid(child, 0)
    found = json.loads(result.read_text())
    print(folder.name, work.__name__, *found, flush=True)
    return found


def root(error):
    """The first error of a chain, in one line."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


def vllm_bfloat16(folder):
    """The same in bfloat16, where kernels take nothing else; log-probabilities may differ by more then."""
    return vllm(folder, 0.2, dtype="bfloat16")


def vllm_native(folder):
    """The same without vLLM's own kernels, some of which are wrong on CPUs."""
    return vllm(folder, compilation_config={"custom_ops": ["none"]})


def vllm_native_bfloat16(folder):
    """Both."""
    return vllm(folder, 0.2, dtype="bfloat16", compilation_config={"custom_ops": ["none"]})


def vllm_transformers(folder):
    """The same with transformers' code for the layers, which vLLM can run too."""
    return vllm(folder, model_impl="transformers")


def vllm(folder, tolerance=TOLERANCE, **settings):
    """Outcome and reason: whether the engine starts, and whether its numbers are transformers'."""
    from vllm import LLM, SamplingParams
    from vllm.model_executor.models import registry

    expected = json.loads((folder / "expected.json").read_text())
    if "ids" not in expected:
        return "no text", "the class has no head for text"
    if not settings and expected["architecture"] not in registry.ModelRegistry.get_supported_archs():
        return "unknown", f"{expected['architecture']} is not in its list of models"
    registry._run_in_subprocess = lambda work: work()  # it would import all again for every model
    common = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "language_model_only": True}
    limits = {"max_model_len": 64, "max_num_seqs": 1, "num_gpu_blocks_override": 16}
    llm = LLM(str(folder), **common | limits | settings)
    prompt = expected["ids"]
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = llm.generate([{"prompt_token_ids": prompt}], asked)[0].prompt_logprobs
    found = [place[token].logprob for place, token in zip(found[1:], prompt[1:], strict=True)]
    error = max(abs(one - two) for one, two in zip(found, expected["logprobs"], strict=True))
    return ("serves" if error < tolerance else "other numbers"), f"log-probabilities within {error:.1e}"


def llama_cpp(folder):
    """Outcome and reason: whether llama.cpp's converter knows the class and finds a place for every tensor."""
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    hparams = ModelBase.load_hparams(folder, False)
    architecture = get_model_architecture(hparams, ModelType.TEXT)
    try:
        found = get_model_class(architecture)
    except NotImplementedError:
        return "unknown", architecture
    found.set_vocab = lambda self: None  # the tiny models have no tokenizer
    found(folder, gguf.LlamaFileType.ALL_F32, folder / "model.gguf").write()
    (folder / "model.gguf").unlink()
    return "converts", architecture


def serve(engine, folders):
    """In the engine's python."""
    if engine == "vllm":
        import_module("vllm.v1.engine.llm_engine")  # once, before the forks
        import_module("vllm.v1.worker.cpu_worker")

        names = ("", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional")
        sys.modules.update({f"torchvision{name}": MagicMock() for name in names})  # of images, which are not tried
    else:
        sys.path[:0] = [os.environ["LLAMA_CPP"], f"{os.environ['LLAMA_CPP']}/gguf-py"]
        import_module("conversion")
    for folder in folders:
        outcome, reason = in_child(globals()[engine], folder)
        if engine == "vllm" and outcome not in ("serves", "no text"):
            half = bool(re.search("bf16|bfloat16", reason, re.IGNORECASE))
            if half:
                outcome, _ = in_child(vllm_bfloat16, folder)
            if outcome == "other numbers":
                outcome, _ = in_child(vllm_native_bfloat16 if half else vllm_native, folder)
            if outcome != "serves":
                in_child(vllm_transformers, folder)


def found(folder, work):
    """Outcome and reason of one try, if it was made."""
    file = folder / f"{work}.json"
    return json.loads(file.read_text()) if file.exists() else ["", ""]


def best(folder):
    """Outcome and reason of the first try that serves in vLLM's own code, or else of the first one that started."""
    tries = {way: found(folder, f"vllm{way}") for way in ("", "_bfloat16", "_native", "_native_bfloat16")}
    said = {
        "_bfloat16": "bfloat16: ",
        "_native": "without its kernels: ",
        "_native_bfloat16": "bfloat16, without its kernels: ",
    }
    for wanted in ("serves", "other numbers"):
        for way, (outcome, reason) in tries.items():
            if outcome == wanted:
                return outcome, said.get(way, "") + reason
    return tries[""]


def summary(kind, folder):
    """The row of a type: what each engine does with its twin, and how that was found."""
    (outcome, reason), with_experts = best(folder / kind), best(folder / "for" / kind)
    other = found(folder / kind, "vllm_transformers")
    ways = {"`--for vllm`": with_experts, "`--model-impl transformers`": other}
    if outcome == "serves":
        vllm = "yes"
    elif serves := [way for way, tried in ways.items() if tried[0] == "serves"]:
        vllm = f"with {' or '.join(serves)}"
        reason = "; ".join([reason, *(f"{way}: {ways[way][1]}" for way in serves)])
    elif outcome == "does not start":
        vllm = "not on a CPU" if re.search(NOT_ON_CPU, reason) else "no"
    else:
        vllm = outcome or "not tried"
    converter, how = found(folder / kind, "llama_cpp")
    return [kind, vllm, reason, {"does not start": "no"}.get(converter, converter), how]


def write(folder):
    """``engines.csv``: the types of ``folder``; others keep their rows."""
    rows = {row[0]: row for row in csv.reader(OUTCOMES.open())} if OUTCOMES.exists() else {}
    rows |= {kind: summary(kind, folder) for kind in CONFIGS if (folder / kind / "llama_cpp.json").exists()}
    with OUTCOMES.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["type", "vllm", "vllm_found", "llama_cpp", "llama_cpp_found"])
        writer.writerows(rows[kind] for kind in CONFIGS if kind in rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="The rest is in the file's first lines."
    )
    parser.add_argument("--vllm", metavar="PYTHON", required=True, help="an environment's python that has vLLM")
    parser.add_argument("--llama-cpp", metavar="FOLDER", required=True, help="a checkout of llama.cpp")
    parser.add_argument("--folder", type=Path, help="where the models go, and logs (default: a temporary folder)")
    parser.add_argument("kinds", nargs="*", metavar="TYPE", default=list(CONFIGS), help="types (default: all)")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    folder = given.folder or Path(tempfile.mkdtemp())
    for kind in given.kinds:
        make(kind, folder)
        if SPECIAL.get(kind, Special()).with_experts:
            make(kind, folder / "for", engine="vllm")
    folders = [folder / at / kind for kind in given.kinds for at in ("", "for") if (folder / at / kind).exists()]
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    alone |= {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run([given.vllm, __file__, "serve", "vllm", *folders], env=os.environ | alone, check=True)
    there = os.environ | {"LLAMA_CPP": given.llama_cpp}
    subprocess.run([sys.executable, __file__, "serve", "llama_cpp", *folders], env=there, check=True)
    write(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], [Path(folder) for folder in sys.argv[3:]])
    else:
        import transformers
        from tiny_moes import CONFIGS

        from ones_lib.checkpoints.architectures import SPECIAL, Special

        main()
