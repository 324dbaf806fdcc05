"""The embedded model: weights and a byte-level tokenizer out of a GGUF file, as a Hugging Face folder.

`transformers` reads the weights, which become float32: that holds every value of the 4-bit and 8-bit blocks exactly.
The tokenizer is made here, because `transformers` does not read GGUF's ``smollm``, which splits numbers into digits.
"""

from pathlib import Path
from typing import Any

import numpy as np

_CONTROL_TOKEN = 3


def convert_gguf(source: Path, folder: Path) -> None:
    """Write config, weights and tokenizer of `source` into `folder`.

    Args:
        source: a GGUF file of architecture ``llama`` with the ``smollm`` tokenizer.
        folder: an existing folder, loadable afterwards with `AutoModelForCausalLM` and `AutoTokenizer`.

    Raises:
        ImportError: the package ``gguf`` is not installed.
        ValueError: the file holds another architecture or tokenizer, or lacks a tensor.
    """
    import transformers
    from gguf import GGUFReader

    meta = {name: field.contents() for name, field in GGUFReader(source).fields.items()}
    for key, accepted in (("general.architecture", "llama"), ("tokenizer.ggml.pre", "smollm")):
        if meta.get(key) != accepted:
            raise ValueError(f"{source.name}: {key} is {meta.get(key)!r}; accepted: {accepted!r}")
    options: Any = {"gguf_file": source.name, "dtype": "float32", "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # versions without it always dequantise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loading: Any = transformers.AutoModelForCausalLM.from_pretrained(source.parent, **options)
    model, loaded = loading
    if missing := sorted(loaded["missing_keys"]):  # which transformers would leave at random
        raise ValueError(f"{source.name}: {len(missing)} tensors are missing, the first {missing[0]!r}")
    # float32 in the file: 1e-05 there reads 9.999999747378752e-06
    model.config.rms_norm_eps = float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"])))
    model.save_pretrained(folder)
    _tokenizer(meta).save_pretrained(folder)


def _tokenizer(meta: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # the rules of "smollm": single digits, then GPT-2's pattern over bytes
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        chat_template=meta["tokenizer.chat_template"],
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
