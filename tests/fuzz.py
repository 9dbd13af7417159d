"""Breaks one thing of a checkpoint at random, converts it, and compares the outcome with what transformers makes of it.

By hand, thousands: ``python tests/fuzz.py --cases 5000 --seed 7``. A conversion must end in one of two ways: with the twin of the
model that transformers loads from the broken folder, or with one line of an error and nothing left behind.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_moes import moe
from transformers import AutoModelForCausalLM

from ones_lib.checkpoints.__main__ import main as convert
from ones_lib.models.causal import SWITCHES

KINDS = {
    "qwen3_moe": {"norm_topk_prob": True},
    "mixtral": {},
    "glm4_moe": {},
    "granitemoe": {},
}
OTHERS = ["two", "", -1, 0, 1, 3, 0.5, True, False, None, [], [1], {}, {"a": 1}, 1000]  # values of a config's key


def sources(folder: Path) -> list[Path]:
    """A whole checkpoint of each kind, in several files."""
    for kind, changes in KINDS.items():
        moe(kind, **changes).save_pretrained(folder / kind, max_shard_size="20KB")
    return [folder / kind for kind in KINDS]


def break_files(folder: Path, chance: random.Random) -> str:
    """A file is missing, empty, cut, swapped with another, there twice, or of another save."""
    weights = sorted(folder.glob("*.safetensors"))
    path, other = chance.sample(weights, 2)
    how = chance.choice(["missing", "empty", "cut", "noise", "swapped", "doubled", "whole", "index", "index missing"])
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
    elif how == "noise":
        start = bytearray(path.read_bytes())
        start[chance.randrange(200)] ^= 1 << chance.randrange(8)
        path.write_bytes(start)
    elif how == "swapped":
        path.rename(folder / "x")
        other.rename(path)
        (folder / "x").rename(other)
    elif how == "doubled":
        shutil.copy(path, folder / f"{path.stem}-copy.safetensors")
    elif how == "whole":
        moe(folder.name, seed=1, **KINDS[folder.name]).save_pretrained(folder / "new")
        shutil.move(folder / "new" / "model.safetensors", folder)
        shutil.rmtree(folder / "new")
    else:
        index = folder / "model.safetensors.index.json"
        if how == "index missing":
            index.unlink()
        else:
            found = json.loads(index.read_text())
            name = chance.choice(sorted(found["weight_map"]))
            found["weight_map"][name] = chance.choice(["none.safetensors", other.name, None, 1])
            index.write_text(json.dumps(found))
    return f"file {how}"


def break_config(folder: Path, chance: random.Random) -> str:
    """A key of config.json is gone, or has another value; or the file is cut."""
    path = folder / "config.json"
    if chance.random() < 0.05:
        path.write_text(path.read_text()[: chance.randrange(path.stat().st_size)])
        return "config cut"
    config = json.loads(path.read_text())
    key = chance.choice(sorted(config))
    if chance.random() < 0.2:
        del config[key]
        what = "gone"
    else:
        config[key] = chance.choice(OTHERS)
        what = json.dumps(config[key])
    path.write_text(json.dumps(config))
    return f"config {key}: {what}"


def break_tensor(folder: Path, chance: random.Random) -> str:
    """A tensor is missing, renamed, of another shape or dtype, not finite."""
    path = chance.choice(sorted(folder.glob("*.safetensors")))
    tensors = load_file(path)
    name = chance.choice(sorted(tensors))
    how = chance.choice(["missing", "renamed", "cut", "flat", "int", "half", "nan", "inf"])
    tensor = tensors.pop(name)
    if how == "renamed":
        tensors[f"{name}.x"] = tensor
    elif how == "nan" or how == "inf":
        tensor.view(-1)[chance.randrange(tensor.numel())] = float(how)
        tensors[name] = tensor
    elif how != "missing":
        change = {"cut": lambda t: t[:-1], "flat": torch.flatten, "int": torch.Tensor.int, "half": torch.Tensor.half}
        tensors[name] = change[how](tensor).contiguous()
    save_file(tensors, path, {"format": "pt"})
    return f"tensor {how}: {name}"


def in_transformers(folder: Path, whole: Path) -> bool:
    """Whether transformers loads all weights of a folder; what it has loaded is saved as ``whole``.

    Two things that transformers refuses are read: files without an index in which every tensor is once, and run-time switches of
    any value.
    """
    index, weights = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))
    if not index.exists():
        names = {name: path.name for path in weights for name in load_file(path)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in SWITCHES}))
    try:
        model, found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except Exception:  # of any type
        return False
    if found["missing_keys"] or found["mismatched_keys"]:
        return False
    model.save_pretrained(whole)
    return True


def converted(source: Path, twin: Path) -> tuple[int, str]:
    """Exit status of a conversion, and what it has said of an error."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            convert(["convert", str(source), str(twin), "--method", "average", "--d-ff", "expert"])
        except SystemExit as end:
            return end.code, said.getvalue()
    return 0, said.getvalue()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def outcome(folder: Path, place: Path) -> str:
    """What a conversion of a broken folder came to. Raises AssertionError if it is neither right nor a refusal."""
    twin, whole, clean = place / "twin", place / "whole", place / "clean"
    status, said = converted(folder, twin)
    if status:
        lines = said.strip().splitlines()
        assert status == 1, said
        assert len(lines) == 1, said
        assert list(place.iterdir()) == [folder], f"left behind: {list(place.iterdir())}"
        return "refused"
    assert in_transformers(folder, whole), "converted, and transformers does not load all of its weights"
    assert converted(whole, clean)[0] == 0, "converted, and refused as transformers has saved it"
    found, expected = weights(twin), weights(clean)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=2e-3, atol=1e-6, msg=name)
    return "converted"


def run(cases: int, seed: int, folder: Path) -> tuple[Counter, list[str]]:
    """Outcomes of as many cases, and what went wrong in which."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bases, outcomes, wrong = sources(folder / "bases"), Counter(), []
    for case in range(cases):
        chance = random.Random(seed * 1_000_003 + case)
        base, place = chance.choice(bases), folder / "case"
        source = Path(shutil.copytree(base, place / base.name))
        what = chance.choice([break_files, break_config, break_config, break_tensor])(source, chance)
        try:
            outcomes[outcome(source, place)] += 1
        except Exception as error:  # any is what is looked for
            wrong.append(f"case {case}, {base.name}, {what}: {type(error).__name__}: {str(error).strip()[-300:]}")
        shutil.rmtree(place)
    return outcomes, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes, wrong = run(options.cases, options.seed, Path(folder))
    print(dict(outcomes), *wrong, f"{len(wrong)} went wrong", sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
