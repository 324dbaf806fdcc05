"""A decoder-only language model as its backbone and its head, however it is wrapped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalLM:
    """The parts of a Hugging Face causal language model that a step needs apart from each other.

    ``logits = cap(scale · head(backbone(input_ids)))``: the backbone gives hidden states, and the head runs
    on chosen positions only, fused with the loss (`qtuning_kernels.linear_cross_entropy`).

    Args:
        model: a `transformers` decoder-only model with a language-model head, or a PEFT model around one.

    Attributes:
        base: the `transformers` model itself, adapters injected.
        decoder: its backbone: ``base.get_decoder()``, or where that is the model or its head, what it is built around.
        logit_scale, softcap: how the head's output becomes logits, read from the configuration.

    Raises:
        ValueError: the model has no such parts, an adapter sits on its head, or its logits are not what
            backbone, head and scaling give (`check`).
    """

    def __init__(self, model: nn.Module) -> None:
        wrapped: Any = model
        self.base: PreTrainedModel = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
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
        head = self.base.get_output_embeddings()
        found = (self.base.get_decoder(), self.base.base_model, getattr(self.base, "model", None))
        decoder = next((each for each in found if each not in (self.base, head, None)), None)
        if decoder is None or head is None:
            raise ValueError(f"model must have a backbone and a language-model head, {name} has not both")
        self.decoder: nn.Module = decoder
        self.logit_scale, self.softcap = _scaling(config.get_text_config())
        _head_module(self.base)  # refuses early

    @property
    def head(self) -> nn.Linear:
        return _head_module(self.base)

    def forward(
        self,
        model: nn.Module,
        input_ids: Tensor,
        position_ids: Tensor | None,
        rows: Tensor,
        head_fn: Callable[[Tensor, Tensor, Tensor | None], Any],
    ) -> Any:
        """``head_fn(hidden [n, H], weight, bias)`` on chosen hidden states, inside the forwards of `model` and head.

        Gradient synchronisation, sharding and adapters hang on the forwards of wrappers and modules, and a parameter
        that is used outside of its module's is one that they do not know of, or that is not gathered. So all of them
        run as always, and only the innermost forwards, of the model and of its head, are others.

        Args:
            model: what the trainer got from wrapping `base`.
            input_ids: ``[B, L]``; position_ids: ``[1, L]`` for packed samples, else None.
            rows: int64 ``[n]``, indices into the flattened hidden states.
            head_fn: what to compute in the place of the logits; its result is the forward's.
        """
        head = self.head

        def of_head(hidden: Tensor) -> Any:
            return head_fn(hidden, head.weight, getattr(head, "bias", None))

        def of_model(input_ids: Tensor, position_ids: Tensor | None = None, **_: Any) -> Any:
            hidden = backbone(self.decoder, input_ids, position_ids).flatten(0, 1)[rows]
            with replaced_forward(head, of_head):
                return self.base.get_output_embeddings()(hidden)

        with replaced_forward(self.base, of_model):
            return model(input_ids=input_ids, position_ids=position_ids)

    def scaling(self) -> dict[str, Any]:
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}

    @torch.no_grad()
    def check(self, model: nn.Module | None = None) -> None:
        """Compares the logits of a few tokens with those of the parts, and with those under another last token.

        Args:
            model: what the trainer got from wrapping `base`; default `base` itself.

        Raises:
            ValueError: the parts' differ, so the model does something between backbone and logits that this
                package does not know; or the last token changes earlier logits, so that the model is not causal.
                Its scores and losses would be wrong.
        """
        model = self.base if model is None else model
        device = next(self.base.parameters()).device
        input_ids = torch.arange(5, device=device).unsqueeze(0) % self.base.config.get_text_config().vocab_size
        other, input_ids = input_ids[:, [0, 1, 2, 4]], input_ids[:, :4]
        rows = torch.arange(4, device=device)
        with evaluation(self.base):
            expected, changed = (model(input_ids=ids, use_cache=False).logits[0] for ids in (input_ids, other))
            logits = self.forward(model, input_ids, None, rows, nn.functional.linear)
        eps = torch.finfo(logits.dtype).eps
        expected, changed, logits = expected.float(), changed.float(), logits.float() * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        finite = torch.isfinite(expected)
        tolerance = 32 * eps * expected[finite].abs().amax() if finite.any() else 0
        if expected.shape != logits.shape or (expected - logits)[finite].abs().gt(tolerance).any():
            raise ValueError(
                f"the logits of {type(self.base).__name__} are not "
                f"softcap·tanh(scale·head(backbone)/softcap) with scale={self.logit_scale} and "
                f"softcap={self.softcap}: this architecture is not supported"
            )
        if (expected - changed)[:3][finite[:3]].abs().gt(tolerance / 4).any():
            raise ValueError(
                f"the logits of {type(self.base).__name__} depend on later tokens; accepted: a causal model (of some "
                "architectures one whose configuration has is_decoder=True)"
            )


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Within it, calling `module` runs its hooks and `forward`; a forward of its instance's own comes back after."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Within it, every module of `model` is in evaluation mode; each has its own mode back after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def head_parameters(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
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
    for name in ("logits_scaling", "logits_mup_width_multiplier"):  # Granite, Inkling
        if (factor := getattr(config, name, None)) is not None:
            scale = scale * factor if config.model_type == "hyperclovax" else scale / factor
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma 2, RecurrentGemma, xLSTM
    return float(scale), next((cap for name in caps if (cap := getattr(config, name, None)) is not None), None)


def _head_module(base: "PreTrainedModel") -> nn.Linear:
    head: Any = base.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # PEFT trains a copy of the head
        adapter = head.active_adapter if isinstance(head.active_adapter, str) else head.active_adapter[0]
        head = head.modules_to_save[adapter]
    if hasattr(head, "base_layer"):
        raise ValueError(
            "an adapter sits on the language-model head, whose weight the fused loss reads directly; "
            "leave the head out of target_modules, or train it whole through modules_to_save"
        )
    return head
