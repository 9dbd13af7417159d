"""Tokens a second in vLLM. A script for a Python that has it, which needs no other package, not even this library:

``ENGINE_PYTHON engine_speed.py '{"folder": "model", "batch_sizes": [1, 16], "prompt": 256, "decoded": 32, "repeats": 5}'``

prints a JSON object: ``engine``, its version, ``threads``, and ``seconds``, by phase and batch size a list of the times of whole
calls. The folder has a config.json; weights are vLLM's dummies, small random numbers, since only speed counts. Tokens are drawn,
not the likeliest ones: else a batch's sequences would become alike, and so would the experts that they need.
"""

import json
import os
import random
import sys
import time


def main(folder: str, batch_sizes: list[int], prompt: int, decoded: int, repeats: int) -> dict:
    """Time prefill, ``prompt`` tokens a sequence and one drawn, and decoding, ``decoded`` tokens after a prompt of 8."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # then OMP_NUM_THREADS counts
    import vllm

    largest = max(batch_sizes)
    engine = vllm.LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=max(prompt, 8 + decoded) + 8,
        max_num_seqs=largest,
        max_num_batched_tokens=max(prompt * largest, 2048),
    )
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        vocabulary = json.load(file)["vocab_size"]
    generator = random.Random(0)

    def call(batch_size: int, length: int, drawn: int) -> float:
        ids = [[generator.randrange(vocabulary) for _ in range(length)] for _ in range(batch_size)]
        prompts = [{"prompt_token_ids": row} for row in ids]
        sampling = vllm.SamplingParams(temperature=1.0, max_tokens=drawn, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - started

    seconds = {}
    for batch_size in batch_sizes:
        for phase, arguments in {"prefill": (prompt, 1), "decoding": (8, decoded)}.items():
            call(batch_size, *arguments)  # warms up
            seconds[f"{phase} {batch_size}"] = [call(batch_size, *arguments) for _ in range(repeats)]
    import torch  # vLLM's

    return {"engine": f"vLLM {vllm.__version__}", "threads": torch.get_num_threads(), "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
