"""mlx-lm's BatchGenerator as the engine uses it."""

from collections.abc import Iterable

from mlx_lm.generate import BatchGenerator

from turbocache.model import LoadedModel


def new_generator(model: LoadedModel, max_batch: int, prefill_chunk: int) -> BatchGenerator:
    """An empty generator that stops at the model's own end tokens."""
    generator = BatchGenerator(
        model.model,
        stop_tokens=[[token] for token in model.tokenizer.eos_token_ids],
        completion_batch_size=max_batch,
        prefill_batch_size=max_batch,
        prefill_step_size=prefill_chunk,
    )
    # Undoes the wired limit that the generator has just set: users' machines ran out of memory under it.
    generator.close()
    return generator


def first_tokens(generator: BatchGenerator, uids: Iterable[int]) -> dict[int, int]:
    """The first token of rows whose prompt has just ended, one decode step before `next` hands it out.

    BatchGenerator starts the following step before it returns a token. For the first token that step is time that
    the user waits, so it is read where the generator keeps it (pinned to mlx-lm 0.32.2; a test watches it).
    """
    wanted, batch = set(uids), generator._generation_batch
    return {uid: int(batch._next_tokens[row].item()) for row, uid in enumerate(batch.uids) if uid in wanted}
