import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the hub must fail at once, not wait for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and so do the processes they start

import pytest
import torch

from ones_lib import Distillation, FeedForwardWeights
from ones_lib.data.images import available_cores
from ones_lib.data.text import text_corpus
from ones_lib.study.records import Records
from ones_lib.study.study import Study
from ones_lib.study.training import Training

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs in as many processes as there are cores, named files in this one; unless ``-n`` says how many."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    if whole and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses = min(available_cores(), 8)
    if getattr(config.option, "numprocesses", 0) and config.option.dist == "no":
        config.option.dist = "worksteal"  # neighbours stay together, as long as nobody is idle


def pytest_collection_modifyitems(items):
    """What takes long and starts processes of its own comes first, in one worker; the others take the short tests from it.

    So the last tests are short, and the workers end together.
    """
    items.sort(key=lambda item: item.get_closest_marker("processes") is None)


def pytest_collection_finish():
    gc.freeze()  # what is imported stays: collections need not look through it again and again
    gc.set_threshold(10_000, 10, 10)


def random_bank(
    num_experts=4, d_ff=12, d_model=8, gated=False, biases=True, dtype=torch.float32, seed=0
) -> FeedForwardWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    e, h, d = num_experts, d_ff, d_model
    return FeedForwardWeights(
        up=draw(e, h, d),
        down=draw(e, d, h),
        gate=draw(e, h, d) if gated else None,
        up_bias=draw(e, h) if biases else None,
        gate_bias=draw(e, h) if biases and gated else None,
        down_bias=draw(e, d) if biases else None,
    )


def equal_bank(num_experts=4, **kwargs) -> FeedForwardWeights:
    """The same expert several times."""
    return random_bank(1, **kwargs).map(lambda t: t.expand(num_experts, *t.shape[1:]).clone())


@pytest.fixture(params=[(False, True), (False, False), (True, True), (True, False)], ids=str)
def form(request):
    """Keyword arguments for each form of FFN: plain or gated, with or without biases."""
    gated, biases = request.param
    return {"gated": gated, "biases": biases}


@pytest.fixture(scope="session")
def common(tmp_path_factory, request):
    """A folder of this run, which its workers share: what makes files there must make them once, under a lock."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if hasattr(request.config, "workerinput") else own


@pytest.fixture(scope="session")
def text_cache(common):
    """A cache that holds the embedded text, which takes some seconds to make."""
    text_corpus(cache_dir=common / "text_cache")
    return common / "text_cache"


@pytest.fixture(scope="session")
def tiny_record(common):
    """The record of an MoE that was trained for a few steps, and the cache with its data."""
    folder = common / "tiny"
    recipe = Training(steps=4, batch_size=16)
    study = Study(
        domain="image",
        data={"name": "glyphs", "image_size": 16, "num_classes": 4, "train_per_class": 20, "val_per_class": 5},
        model={"name": "widenet_tiny_patch16_224", "patch_size": 4, "num_experts": 4, "renormalize": True}
        | {"embed_dim": 8, "depth": 2, "num_heads": 2, "d_ff": 12},
        teaching=recipe,
        learning=recipe,
        distillation=Distillation(),
        records=Records(folder / "records"),
        cache_dir=folder / "cache",
        processes=1,
    )
    (record,) = study.run([study.moe(0)])
    return record, study.cache_dir
