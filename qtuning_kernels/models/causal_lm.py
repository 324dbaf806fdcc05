"""A decoder-only language model as its backbone and its head, however it is wrapped."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class CausalLM:
    """The parts of a Hugging Face causal language model that a step needs apart from each other.

    ``logits = cap(scale · head(backbone(input_ids)))``: the backbone gives hidden states, and the head runs
    on chosen positions only, fused with the loss (`qtuning_kernels.linear_cross_entropy`).

    Args:
        model: a `transformers` decoder-only model with a language-model head, or a PEFT model around one.

    Attributes:
        base: the `transformers` model itself, adapters injected.
        decoder: its backbone, ``base.get_decoder()``.
        logit_scale, softcap: how the head's output becomes logits, read from the configuration.

    Raises:
        ValueError: the model has no such parts, an adapter sits on its head, or its logits are not what
            backbone, head and scaling give (`check`).
    """

    def __init__(self, model: nn.Module) -> None:
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        name = type(self.base).__name__
        config = getattr(self.base, "config", None)
        if config is None or not hasattr(self.base, "get_output_embeddings"):
            raise ValueError(f"model must be a transformers causal language model, got {name}")
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"model must be decoder-only, got the encoder-decoder {name}")
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "model uses prompt learning (prefix or prompt tuning), which changes the sequence; "
                "accepted: adapters on weights, such as LoRA"
            )
        self.decoder = self.base.get_decoder()
        if self.decoder is self.base or self.base.get_output_embeddings() is None:
            raise ValueError(f"model must have a backbone and a language-model head, {name} has not both")
        self.logit_scale, self.softcap = _scaling(config.get_text_config())
        _head_module(self.base)  # refuses early

    @property
    def head(self) -> nn.Module:
        return _head_module(self.base)

    def forward(
        self,
        model: nn.Module,
        input_ids: Tensor,
        position_ids: Tensor | None,
        head_fn: Callable[[Tensor], Any],
    ) -> Any:
        """``head_fn(hidden states [B, L, H])``, computed inside the forward of `model`, whatever wraps it.

        Gradient synchronisation, sharding and adapters hang on the wrappers' forward, and a parameter that
        is used outside of it is one that they do not know of. So the wrappers run as always, the head and
        the loss run inside, and only the innermost forward is another.

        Args:
            model: what the trainer got from wrapping `base`.
            input_ids: ``[B, L]``; position_ids: ``[1, L]`` for packed samples, else None.
            head_fn: what to compute from the hidden states; its result is the forward's.
        """

        def innermost(input_ids: Tensor, position_ids: Tensor | None = None, **_: Any) -> Any:
            return head_fn(backbone(self.decoder, input_ids, position_ids))

        own = self.base.__dict__.get("forward")
        self.base.forward = innermost
        try:
            return model(input_ids=input_ids, position_ids=position_ids)
        finally:
            if own is None:
                del self.base.forward
            else:
                self.base.forward = own

    def scaling(self) -> dict[str, float | None]:
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}

    @torch.no_grad()
    def check(self) -> None:
        """Compares the model's own logits with those of its parts on a few tokens.

        Raises:
            ValueError: they differ, so the model does something between backbone and logits that this
                package does not know, and its scores and losses would be wrong.
        """
        weight, bias = head_parameters(self.head)
        input_ids = torch.arange(4, device=weight.device).unsqueeze(0) % weight.shape[0]
        training = self.base.training
        self.base.eval()
        try:
            expected = self.base(input_ids=input_ids, use_cache=False).logits.float()
            hidden = backbone(self.decoder, input_ids)
            logits = nn.functional.linear(hidden.to(weight.dtype), weight, bias).float() * self.logit_scale
        finally:
            self.base.train(training)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        finite = torch.isfinite(expected)
        tolerance = 32 * torch.finfo(weight.dtype).eps * expected[finite].abs().amax() if finite.any() else 0
        if expected.shape != logits.shape or (expected - logits)[finite].abs().gt(tolerance).any():
            raise ValueError(
                f"the logits of {type(self.base).__name__} are not "
                f"softcap·tanh(scale·head(backbone)/softcap) with scale={self.logit_scale} and "
                f"softcap={self.softcap}: this architecture is not supported"
            )


def head_parameters(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A head's weight ``[V, H]`` and its bias ``[V]`` or None.

    Raises:
        ValueError: the weight is sharded, so that what is at hand is no head.
    """
    weight = head.weight
    if weight.numel() == 0 or hasattr(weight, "full_tensor"):
        raise ValueError(
            "the language-model head is sharded and was not gathered, so its weight is not at hand; leave "
            "the head (and what it is tied to) unsharded, or train with DDP"
        )
    return weight, getattr(head, "bias", None)


def backbone(decoder: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """The hidden states ``[B, L, H]`` that enter the head."""
    positions = {} if position_ids is None else {"position_ids": position_ids}
    return decoder(input_ids=input_ids, use_cache=False, **positions)[0]


def _scaling(config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) under the names that the library's configurations use."""
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse Glimmer, Falcon H1
        if (factor := getattr(config, name, None)) is not None:
            scale *= factor
    if (factor := getattr(config, "logits_scaling", None)) is not None:
        scale = scale * factor if config.model_type == "hyperclovax" else scale / factor  # Granite divides
    return float(scale), getattr(config, "final_logit_softcapping", None)  # Gemma 2


def _head_module(base: nn.Module) -> nn.Module:
    head = base.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # PEFT trains a copy of the head
        adapter = head.active_adapter if isinstance(head.active_adapter, str) else head.active_adapter[0]
        head = head.modules_to_save[adapter]
    if hasattr(head, "base_layer"):
        raise ValueError(
            "an adapter sits on the language-model head, whose weight the fused loss reads directly; "
            "leave the head out of target_modules, or train it whole through modules_to_save"
        )
    return head
