"""The text tokenizer of the `tiny` policies: byte-level BPE, trained in a moment on a dataset's instructions.

Its words become one token each, so that sequences are short; everything else falls back to bytes, so that any Unicode
and the empty instruction have tokens. It is an ordinary tokenizer of transformers, saved in the policy folder.

    tokenizer = train_tokenizer(["open the drawer", "close the drawer"])
    tokenizer(["open it", ""], padding=True, return_tensors="pt")     # <s> ... </s>, padded on the left
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lapa.errors import UserError
from lapa.files import writing

PAD, BEGIN, END = "<pad>", "<s>", "</s>"


def train_tokenizer(texts: Iterable[str], vocabulary_size: int = 1024) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocabulary_size` tokens: three special ones, 256 bytes, and the texts' pieces and words.

    The same texts give the same tokenizer, in whatever order and however often each comes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=1,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        # An instruction that spells "</s>" is words, not a control token.
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer as transformers does. OSError naming the folder where the system refuses."""
    with writing(folder):
        tokenizer.save_pretrained(str(folder))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Reads a saved tokenizer. UserError naming the folder where there is none."""
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder}: no tokenizer.json; the policy folder is incomplete, train it again")
    return PreTrainedTokenizerFast.from_pretrained(folder)
