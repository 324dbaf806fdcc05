"""Policies by name."""

import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from qtuning_kernels.config import QTuningConfig
from qtuning_kernels.pruning.policies import baselines, dynamics, qtuning, tokens, weights
from qtuning_kernels.pruning.policies.protocol import NEEDS, Policy

POLICIES: dict[str, type[Policy]] = {
    "full": baselines.Full,
    "random": baselines.Random,
    "longest": baselines.Longest,
    "entropy": baselines.Entropy,
    "infobatch": dynamics.InfoBatch,
    "ppl": tokens.Ppl,
    "ppl_reversed": tokens.PplReversed,
    "rho1": tokens.Rho1,
    "token_cleaning": tokens.TokenCleaning,
    "stm": tokens.STM,
    "profit": tokens.ProFit,
    "dft": weights.DFT,
    "beyond_ll": weights.BeyondLL,
    "eaft": weights.EAFT,
    "tailsft": dynamics.TailSFT,
    "qtuning": qtuning.QTuning,
    "qtuning_residual": qtuning.QTuningResidual,
}


def make_policy(config: QTuningConfig) -> Policy:
    """The policy that the settings name, with its options.

    Q-Tuning with both ratios 1 keeps everything, and is made `Full`.

    Raises:
        ValueError: an unknown option, or one that the policy does not accept.
        TypeError: what ``module:object`` names is no policy.
    """
    policy = config.policy
    if isinstance(policy, str):
        policy = _named(policy)
    if isinstance(policy, type):
        policy = policy(**_options(policy, config))
    elif config.policy_options:
        raise ValueError(f"policy_options is {config.policy_options!r}; accepted: none, since policy is an object")
    if not isinstance(policy, Policy):
        raise TypeError(f"policy is {policy!r}; accepted: a name, module:object, or a Policy")
    if unknown := policy.needs - NEEDS:
        raise ValueError(f"{policy!r} needs {sorted(unknown)}; accepted: of {sorted(NEEDS)}")
    if isinstance(policy, qtuning.QTuning) and policy.sample_ratio == policy.token_ratio == 1:
        return baselines.Full()
    return policy


def _named(name: str) -> Any:
    if name in POLICIES:
        return POLICIES[name]
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"policy is {name!r}, and it cannot be imported: {error}") from error


def _options(policy: type, config: QTuningConfig) -> Mapping[str, Any]:
    accepted = {each.name for each in fields(policy)}
    if unknown := set(config.policy_options) - accepted:
        raise ValueError(f"policy_options has {sorted(unknown)}; accepted for {config.policy}: {sorted(accepted)}")
    settings = {each.name for each in fields(QTuningConfig)}
    return {name: getattr(config, name) for name in accepted & settings} | dict(config.policy_options)
