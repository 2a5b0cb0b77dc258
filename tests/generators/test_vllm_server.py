"""vLLM as a server: a real one on the CPU that is killed in the middle, and a false one that misbehaves."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchtune.models.llama3_2 import llama3_2

from spin.core.errors import ConfigError, GeneratorError
from spin.core.ranks import init_world, shutdown
from spin.generators import GeneratorContext, SamplingParams, TorchtuneGenerator, VLLMServerGenerator
from spin.generators import vllm_server as module
from spin.generators.engines import policy_loaded
from spin.model.build import prepare_model
from spin.model.hf import load_hf_weights
from spin.pairs.packing import RowLayout
from spin.reference.generator_check import check_generator_logprobs
from tests.false_server import GOOD, false_servers
from tests.generators.vllm_engine import dataset
from tests.recipes.helpers import free_port

KEY = "a-key-that-must-not-be-shown"
GREEDY = SamplingParams(temperature=0, max_new_tokens=40, stop_token_ids=(2,))


@pytest.fixture(scope="module")
def untied(tmp_path_factory, tiny_lm):
    """The tiny model with a head of its own: a CPU server's reload leaves a tied head as it was."""
    folder = tmp_path_factory.mktemp("untied")
    tensors = load_file(tiny_lm / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tiny_lm / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_lm / name).read_bytes())
    return folder


@pytest.fixture
def context(untied):
    """The policy, five per cent larger than what lies in the folder that the server starts from."""
    world = init_world("cpu")
    with torch.device("meta"):
        model = llama3_2(
            vocab_size=1024, num_layers=4, num_heads=4, num_kv_heads=2, embed_dim=128, intermediate_dim=384,
            max_seq_len=512, rope_base=10000, norm_eps=1e-5, scale_factor=1, tie_word_embeddings=False,
        )  # fmt: skip
    prepare_model(model, world, compute_dtype=torch.float32)
    load_hf_weights(model, untied, "LLAMA3_2", world=world)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    yield GeneratorContext(model, world.device, 512, lambda ids: "", world)
    shutdown()


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 1000, (40 + i,), generator=generator).tolist() for i in range(24)]


class Server:
    """`vllm serve` on the CPU, in a process group that can be killed."""

    def __init__(self, folder, log):
        self.folder, self.log, self.port = folder, log, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        env |= {"VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder), "--host",
            "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512",
            "--kv-cache-memory-bytes", str(64 << 20), "--block-size", "32", "--generation-config", "vllm",
            "--api-key", KEY,
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        return self

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM; `make vllm` installs it")
def test_a_server_has_the_policys_weights_also_after_it_was_killed_in_the_middle(
    context, untied, prompts, tmp_path, monkeypatch, caplog
):
    """Responses are the trainer's, those that were finished are kept, and the key is shown nowhere."""
    monkeypatch.setenv("SPIN_TEST_KEY", KEY)
    server = Server(untied, tmp_path / "server.log").start()
    try:
        arguments = {
            "url": server.url, "transfer_dir": str(tmp_path / "weights"), "model_dir": str(untied),
            "model_type": "LLAMA3_2", "dtype": "fp32", "concurrency": 2, "wait_seconds": 600,
        }  # fmt: skip
        generator = VLLMServerGenerator(context, **arguments, api_key_env="SPIN_TEST_KEY")
        with pytest.raises(GeneratorError, match="api_key_env") as refused:
            VLLMServerGenerator(context, **arguments)
        with pytest.raises(GeneratorError, match="no weights"):
            generator.generate(prompts, GREEDY, [0] * len(prompts))
        expected = TorchtuneGenerator(context).generate(prompts, GREEDY, [0] * len(prompts))

        with policy_loaded(generator, context.model):
            gap = check_generator_logprobs(
                generator, context.model, context.world, dataset(prompts), GREEDY,
                layout=RowLayout(512), chunk_tokens=512,
            )  # fmt: skip
            assert gap < 1e-5
            stream = filter(None, generator.stream(((ids, 0) for ids in prompts), GREEDY))
            found = dict(next(stream) for _ in range(5))
            server.kill()
            threading.Timer(2.0, server.start).start()
            rest = dict(stream)
            assert not found.keys() & rest.keys()
            found |= rest
        assert [found[i] for i in range(len(prompts))] == expected
        own = VLLMServerGenerator(  # asked as a judge is: by a model folder's tokens alone
            GeneratorContext(None, torch.device("cpu"), 512, lambda ids: ""), server.url, api_key_env="SPIN_TEST_KEY"
        )
        assert own.generate(prompts, GREEDY, [0] * len(prompts)) == expected
        assert any("resending the policy weights" in record.message for record in caplog.records)
        assert KEY not in str(refused.value) and KEY not in caplog.text
        with pytest.raises(GeneratorError, match="prompt 0 has 512 tokens"):
            generator.generate([[5] * 512], GREEDY, [0])
    finally:
        server.kill()


# ---- a false server


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.02)
    with false_servers() as start:
        yield start


def generator_of(context, untied, tmp_path, url, **arguments):
    return VLLMServerGenerator(
        context, url, str(tmp_path / "weights"), str(untied), "LLAMA3_2", dtype="fp32",
        **{"wait_seconds": 0.3, "concurrency": 1} | arguments,
    )  # fmt: skip


@pytest.fixture
def connect(context, untied, tmp_path, serve):
    """A false server and a generator that has sent it the weights."""

    def start(timeout_seconds=600.0, **replies):
        server = serve(**replies)
        generator = generator_of(context, untied, tmp_path, server.url, timeout_seconds=timeout_seconds)
        generator.update_weights([])
        return server, generator

    return start


def test_what_is_asked_of_a_server(connect, tmp_path):
    server, generator = connect()
    (reload,) = server.bodies("/collective_rpc")
    assert reload == {"method": "reload_weights", "kwargs": {"weights_path": str((tmp_path / "weights").resolve())}}
    assert (tmp_path / "weights" / "model.safetensors").exists()
    (response,) = generator.generate([[4, 5]], GREEDY, [2**63 - 1])
    assert (response.token_ids, response.finish_reason, response.logprobs) == ([7, 9], "stop", None)
    (asked,) = server.bodies("/v1/completions")
    assert asked["prompt"] == [4, 5] and asked["seed"] == 2**63 - 1 and asked["return_token_ids"]
    assert "logprobs" not in asked


def test_a_response_with_a_token_that_the_tokenizer_lacks_is_asked_for_again_without(connect):
    bad = {"choices": [{"token_ids": [7, 1020, 2], "finish_reason": "stop"}]}
    server, generator = connect(v1__completions=[bad, GOOD])
    (response,) = generator.generate([[4, 5]], replace(GREEDY, banned_token_ids=(1020, 1021)), [3])
    assert response.token_ids == [7, 9]
    first, second = server.bodies("/v1/completions")
    assert second == first | {"logit_bias": {"1020": -100.0, "1021": -100.0}}


def test_a_server_that_keeps_its_own_weights_is_sent_none(serve):
    """A judge: no model here, no weights there, and its name says whose responses they are."""
    server = serve()
    context = GeneratorContext(None, torch.device("cpu"), sys.maxsize, lambda ids: "", None)
    generator = VLLMServerGenerator(context, server.url, concurrency=1, wait_seconds=0.3)
    generator.wake()
    assert generator.generate([[4, 5]], GREEDY, [0])[0].token_ids == [7, 9]
    assert not set(server.paths) & {"/collective_rpc", "/reset_prefix_cache", "/metrics"}
    assert (generator.fingerprint, generator.max_logprob_gap, generator.max_seq_len) == ("served m", None, 64)
    with pytest.raises(ConfigError, match="transfer_dir: not set"):
        generator.update_weights([])
    with pytest.raises(ConfigError, match="go together"):
        VLLMServerGenerator(context, server.url, model_dir="x")


def test_a_busy_server_is_asked_again_and_a_restarted_one_gets_the_weights_first(connect):
    """The second reply of /metrics comes from another process: its weights are loaded before it is asked again."""
    server, generator = connect(v1__completions=[(503, {}), GOOD])
    server.answers["/metrics"] = ["process_start_time_seconds 1.5\n", "process_start_time_seconds 9\n"]
    assert generator.generate([[4]], GREEDY, [0])[0].token_ids == [7, 9]
    first, second = (i for i, path in enumerate(server.paths) if path == "/v1/completions")
    assert "/collective_rpc" in server.paths[first:second]


def test_a_server_that_is_busy_when_it_should_load_is_asked_again(connect):
    server, generator = connect(collective_rpc=[(503, {}), {}], reset_prefix_cache=[(503, {}), {"success": True}])
    assert server.paths.count("/collective_rpc") == 2
    assert generator.generate([[4]], GREEDY, [0])[0].token_ids == [7, 9]


def hang(server):
    server.is_over.wait(1.0)
    return [b""]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((503, {}), "did not answer for 0.3 s.*HTTP 503"),
        ((500, {"error": "engine died"}), "did not answer.*engine died"),
        ((400, {"error": "bad seed"}), "HTTP 400.*bad seed"),
        ((401, {}), "api_key_env"),
        ({"choices": [{"finish_reason": "stop"}]}, "no token ids"),
        ({"choices": [{"token_ids": [], "finish_reason": "abort"}]}, "'abort'"),
        (hang, r"((for|within) 0\.3 s|3 times).*Timeout"),
    ],
)
def test_a_server_that_fails_for_good(connect, reply, message):
    _, generator = connect(timeout_seconds=0.2 if reply is hang else 600.0, v1__completions=reply)
    with pytest.raises(GeneratorError, match=message):
        generator.generate([[4]], GREEDY, [0])


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ({"collective_rpc": (404, {})}, "VLLM_SERVER_DEV_MODE=1"),
        ({"reset_prefix_cache": {"success": False}}, "did not reset its prefix cache"),
        ({"version": {"version": "0.11.0"}}, r"runs vLLM 0\.11\.0, expected 0\.20"),
    ],
)
def test_a_server_that_does_not_take_weights(connect, replies, message):
    with pytest.raises(GeneratorError, match=message):
        connect(**replies)


def test_a_server_behind_tls_is_believed_by_its_certificate(context, untied, tmp_path, serve):
    """Signed by nobody that this machine knows: refused, until the config names the certificate."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key), "-out",
         str(certificate), "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    url = serve(certificate=(certificate, key)).url
    with pytest.raises(GeneratorError, match="generator.verify"):
        generator_of(context, untied, tmp_path, url)
    generator = generator_of(context, untied, tmp_path, url, verify=str(certificate))
    generator.update_weights([])
    assert generator.generate([[4]], GREEDY, [0])[0].token_ids == [7, 9]
