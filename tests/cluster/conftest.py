"""A tiny study, and a Ray that keeps to folders of its own."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.cluster_utils import Cluster
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.cluster.tiny_study import CONCEPT, REPOSITORY, Tiny


@pytest.fixture(scope="session", autouse=True)
def ray_of_our_own():
    """Ray's token in a home of ours, its sessions in a short folder of ours, and no cluster but ours."""
    home = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    # The embedded model is converted where caches are, which takes 20 s.
    cache = os.environ.get("XDG_CACHE_HOME") or f"{Path.home()}/.cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", cache)
        patch.delenv("RAY_ADDRESS", raising=False)
        for name in ("HOME", "RAY_TMPDIR"):
            patch.setenv(name, home)
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    letters = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    shape = LlamaConfig(
        vocab_size=len(letters), hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0, bos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    for name in ("code", "alien"):
        (folder / f"{name}.toml").write_text(CONCEPT.format(name=name))
    return Tiny(folder)


@pytest.fixture(scope="session")
def cluster(ray_of_our_own) -> Iterator[dict[str, str]]:
    """A cluster of one node that runs already; the environment that leads a job to it."""
    node = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield {"RAY_ADDRESS": node.address}
    node.shutdown()


@pytest.fixture(scope="session", autouse=True)
def beginning(request, ray_of_our_own, tiny, tmp_path_factory) -> Iterator[tuple[subprocess.Popen, str] | None]:
    """The study that nothing happens to, begun before the first test where any asks for it: it takes 20 s."""
    if not any("undisturbed" in item.fixturenames for item in request.session.items):
        yield None
        return
    storage = tmp_path_factory.mktemp("undisturbed")
    pipe: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(tiny.command("ortho", str(storage), "run"), cwd=REPOSITORY, **pipe) as job:
        yield job, str(storage / "run")
        job.kill()


@pytest.fixture(scope="session")
def undisturbed(beginning) -> tuple[subprocess.CompletedProcess, str]:
    """A study that nothing happened to: what its job said, and where it is."""
    job, url = beginning
    out, err = job.communicate(timeout=300)
    return subprocess.CompletedProcess(job.args, job.returncode, out, err), url


def pytest_collection_modifyitems(config, items):
    """The long chaos run is for `make chaos` alone: `-m chaos`."""
    if "chaos" not in (config.option.markexpr or ""):
        for item in items:
            if item.get_closest_marker("chaos"):
                item.add_marker(pytest.mark.skip(reason="takes half an hour: make chaos"))
