"""Which rows of a text are measured: the same plan for a run, for each of its parts, and for those who join them."""

from collections.abc import Sequence

from fisher_jax.cli.report.settings import ReportSettings
from fisher_jax.cli.report.store import Text
from fisher_jax.models import LanguageModel
from fisher_jax.text.corpora import documents
from fisher_jax.text.packing import Packed, longest_document, pack


def plan_of(settings: ReportSettings, sources: Sequence[str], split: str, model: LanguageModel) -> Packed:
    """The rows that are streamed and those that are held out.

    Raises:
        InputError: a text that cannot be read, or too little of it.
    """
    longest = longest_document(settings.max_tokens, settings.held_out_tokens, settings.row_length)
    return pack(
        documents(sources, split=split, longest=longest),
        model.tokenizer.encode,
        seq_len=settings.row_length,
        max_targets=settings.max_tokens,
        held_out_targets=settings.held_out_tokens,
        vocab_size=model.config.vocab_size,
    )


def text_of(settings: ReportSettings, plan: Packed) -> Text:
    """What a run keeps of its text."""
    return Text(list(settings.text), settings.split_documents, plan.digest())
