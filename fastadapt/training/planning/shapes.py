"""The numbers that a memory plan is about, from a run's and its models' configurations.

B sequences, T tokens, N = B T, D width, I width inside the MLP, F features, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastadapt.kernels.transcoder.codes import dense_share
from fastadapt.models.baselines import norms_of
from fastadapt.models.pair import DTYPES
from fastadapt.models.pretrained import ARCHITECTURES
from fastadapt.training.config import TrainConfig
from fastadapt.training.optimizer import MOMENT_BYTES

FP32 = 4  #: bytes


@dataclass(frozen=True)
class Shapes:
    """The numbers that the arithmetic is about; bytes per element are named ``..._bytes``."""

    kind: str  # of what is trained
    layers: int
    sequences: int  # B
    tokens: int  # N
    width: int  # D
    inner: int  # I
    heads: int
    query: int  # width of all query heads together
    key: int  # width of all key heads together
    vocabulary: int
    features: int
    norms: int  # per layer
    ranks: int  # that share blocks, gradients and moments
    offload: bool  # frozen weights of the blocks are in host memory
    target_parameters: int
    whole_parameters: int  # of the target, outside its blocks: every rank has all of them
    mlp_parameters: int
    adapter_parameters: int  # per layer
    trained_parameters: int  # of all layers, and of the last norm where that is trained
    bridged: bool
    nmse: bool
    element_bytes: int
    logit_bytes: int
    gradient_bytes: int  # summed
    moment_bytes: float  # of each of the two
    masters: bool
    dense_kernel: bool  # the reference kernel: nothing is kept, all of [N, F] is recomputed
    ranked: bool  # topk and batch_topk
    windowed: bool  # jumprelu
    eager: bool  # attention makes [T, T]
    capped: bool  # and caps its scores
    checkpoint: str  # of fastadapt.models.recompute
    on_gpu: bool
    codes_per_token: float  # the most that are kept as codes
    accumulate: bool
    chunk: int
    scratch_elements: int  # of the chunked kernels' blocks

    @classmethod
    def of(
        cls, config: TrainConfig, target: Any, tokens: int, device: str, ranks: int = 1
    ) -> Shapes:
        """From the run's configuration, the target's, and the tokens of the longest sequence.

        ``device`` is the kind that the run is planned for, ``cuda`` or ``cpu``; ``ranks`` is how
        many of them share the run.
        """
        from transformers import AutoModelForCausalLM

        paths = ARCHITECTURES[target.model_type]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                target, trust_remote_code=config.pair.trust_remote_code
            )
        layers = getattr(getattr(model, paths.decoder), paths.layers)
        mlp = getattr(layers[0], paths.mlp)
        dtype = DTYPES[config.pair.dtype]
        d, f, kind = target.hidden_size, config.n_features, config.run.trains
        head = getattr(target, "head_dim", None) or d // target.num_attention_heads
        wide, low = dtype.itemsize, dtype.itemsize < FP32
        attention = paths.attention if config.pair.attention == "auto" else config.pair.attention
        implementation = config.adapter.implementation
        on_codes = device == "cpu" or dtype != torch.float64
        jump = config.adapter.activation == "jumprelu"
        n = config.optimizer.batch_size * tokens
        everything = sum(p.numel() for p in model.parameters())
        norm = sum(p.numel() for _, part in norms_of(layers[0]) for p in part.parameters())
        trained = {
            "transcoder": 2 * f * d + f + d + (f if jump else 0),
            "mlp": sum(p.numel() for p in mlp.parameters()),
            "norms": norm,
        }[kind]
        summed = FP32 if low and config.optimizer.masters else wide
        return cls(
            kind=kind,
            layers=len(layers),
            sequences=config.optimizer.batch_size,
            tokens=n,
            width=d,
            inner=target.intermediate_size,
            heads=target.num_attention_heads,
            query=head * target.num_attention_heads,
            key=head * target.num_key_value_heads,
            vocabulary=target.vocab_size,
            features=f,
            norms=sum("norm" in name for name, _ in layers[0].named_children()),
            ranks=ranks,
            offload=config.pair.offload,
            target_parameters=everything,
            whole_parameters=everything - sum(p.numel() for p in layers.parameters()),
            mlp_parameters=sum(p.numel() for p in mlp.parameters()) * len(layers),
            adapter_parameters=trained,
            trained_parameters=trained * len(layers) + (d if kind == "norms" else 0),
            bridged=config.objective.bridge > 0,
            nmse=config.objective.nmse > 0,
            element_bytes=wide,
            logit_bytes=max(wide, FP32)
            if config.objective.logits_dtype is None or device == "cpu"
            else DTYPES[config.objective.logits_dtype].itemsize,
            gradient_bytes=summed,
            moment_bytes=MOMENT_BYTES if config.optimizer.moments == "8bit" else summed,
            masters=low and config.optimizer.masters,
            dense_kernel=implementation == "reference"
            or (implementation == "auto" and not on_codes),
            ranked=config.adapter.activation in ("topk", "batch_topk"),
            windowed=jump,
            eager=attention == "eager",
            capped=getattr(target, "attn_logit_softcapping", None) is not None,
            checkpoint=config.objective.checkpoint,
            accumulate=config.optimizer.accumulation > ranks,
            chunk=min(config.objective.kl_chunk_tokens, n),
            scratch_elements=2**19 if device == "cpu" else 0,
            on_gpu=device == "cuda",
            codes_per_token=dense_share(dtype, device) * f,
        )

    @property
    def forked(self) -> bool:
        """Whether there is a cutoff with both bridges."""
        return self.bridged and self.layers > 1

    @property
    def upcast(self) -> int:
        """Bytes of the fp32 copy that is made of a low-precision element; 0 of a wide one."""
        return FP32 if self.element_bytes < FP32 else 0

    def rows(self, layer: int) -> int:
        """Streams that go through the replacement's block together, layers counted from 0."""
        return 2 if self.forked and layer >= 1 else 1

    def bridges(self, layer: int) -> int:
        """Streams that go through the target's block with gradients."""
        return 1 if self.forked and layer >= 1 else 0
